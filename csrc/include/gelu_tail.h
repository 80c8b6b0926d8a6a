// Q(a) = erfcx(a / sqrt 2) / 2 for a >= 0 as t P(t), t = 1 / (1 + 0.34 a): the upper tail of the normal distribution is
// exp(-a^2 / 2) Q(a). P is fitted to 3.1e-8 of Q for a <= 14 (Lawson's iterations on Chebyshev nodes).
#pragma once

namespace growth_ds {

#define GROWTH_DS_TAIL_STEP 0.34f
#define GROWTH_DS_TAIL(t)                                                                                              \
  ((((((((((t) * -0.02612045f + 0.13949939f) * (t) - 0.27313254f) * (t) + 0.20218244f) * (t) - 0.04471829f) * (t) +    \
        0.1153591f) * (t) + 0.11519768f) * (t) + 0.13611219f) * (t) + 0.1356205f) * (t))

}  // namespace growth_ds
