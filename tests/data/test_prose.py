"""Prose out of docstrings: sentences stay, everything else goes."""

from __future__ import annotations

import pytest

from growth_ds.data.prose import prose_paragraphs

NUMPY_STYLE = """
    Return the discrete Fourier transform of the input.

    This function computes the *n*-point transform with the
    efficient algorithm of :func:`~scipy.fft.cooley` [1]_.

    Parameters
    ----------
    a : array_like, optional
        The input array, which can be complex and of any length.
    axis : int
        Axis over which to compute.

    Returns
    -------
    out : ndarray
        The truncated or padded input, transformed along the axis.

    Examples
    --------
    >>> np.fft.fft(np.exp(2j * np.pi))
    array([-2.33486982e-16+1.14423775e-17j])

    In this example, the real input has a transform that is Hermitian::

        import matplotlib.pyplot as plt
        this is not a sentence that may be kept in any way

    .. note:: hidden

        The values are ordered in the way that is described above.

    .. code-block:: python

        this would read as a sentence of the text if it were kept

    References
    ----------
    .. [1] Cooley, James W., and John W. Tukey, in a journal of the time.
"""

GOOGLE_STYLE = """Builds the model from a folder of weights that is given by its `path`.

Args:
    path (`str` or `os.PathLike`, *optional*, defaults to `None`):
        The folder to read, which must have been written by the same version.
    strict (bool): Whether a missing weight is an error of the caller or not.
    rate: The share of the weights that are set to zero at random.

```python
this is a fence that would read as a sentence of the text
```

- Each item of a list is a paragraph of its own in the text.
- See [the guide](https://example.org/a?b=c) for all of the details that matter.

:param name: The name under which it will be stored in the table.
:returns: self.x == y
"""


def test_numpy_style() -> None:
    assert prose_paragraphs(NUMPY_STYLE) == [
        "Return the discrete Fourier transform of the input.",
        "This function computes the n-point transform with the efficient algorithm of cooley.",
        "The input array, which can be complex and of any length.",
        "The truncated or padded input, transformed along the axis.",
        "In this example, the real input has a transform that is Hermitian:",
        "The values are ordered in the way that is described above.",
    ]


def test_google_style_and_markdown() -> None:
    assert prose_paragraphs(GOOGLE_STYLE) == [
        "Builds the model from a folder of weights that is given by its path.",
        "The folder to read, which must have been written by the same version.",
        "Whether a missing weight is an error of the caller or not.",
        "The share of the weights that are set to zero at random.",
        "Each item of a list is a paragraph of its own in the text.",
        "See the guide for all of the details that matter.",
        "The name under which it will be stored in the table.",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "x = f(a, b) and the rest of the line is here.",
        "foo bar baz qux quux corge grault garply waldo fred plugh xyzzy",
        "The name.",
        "a_b c_d e_f g_h the i_j is k_l of m_n.",
        "0.1 0.2 0.3 0.4 the 0.5 0.6 of 0.7 0.8 is 0.9 1.0",
        "| the table | is not | a sentence of | the text |",
    ],
)
def test_what_does_not_read_as_english_is_left_out(text: str) -> None:
    assert prose_paragraphs(text) == []


def test_bad_sentences_go_and_good_ones_stay() -> None:
    text = "This is the first sentence of it. Call `f(x=1)` and a = b. This is the last sentence of it."
    assert prose_paragraphs(text) == ["This is the first sentence of it. This is the last sentence of it."]


def test_the_mask_token_and_its_kin_do_not_get_into_the_text() -> None:
    assert prose_paragraphs("The model fills in a [MASK] for each of the words.") == [
        "The model fills in a for each of the words."
    ]
