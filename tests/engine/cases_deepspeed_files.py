"""Cases for test_deepspeed_files.py: folders that DeepSpeed writes, read and converted, and ours loaded by it."""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from growth_ds.engine import distributed
from growth_ds.engine.rigid import open_rigid
from growth_ds.engine.universal import FILES, open_universal, write_universal
from growth_ds.engine.zero import ZeroEngine
from growth_ds.errors import UserError
from growth_ds.interop import names
from tests.checkpoints import TINY
from tests.engine import tiny

CONVERTED = [(stage, precision) for precision in ("fp32", "bf16") for stage in (1, 2, 3)]
KINDS = ("weight", "exp_avg", "exp_avg_sq")
DECAYS = [tiny.DECAY, 0.0]


@contextlib.contextmanager
def shared_folder():
    """One temporary folder for all ranks."""
    path = distributed.broadcast_object(tempfile.mkdtemp() if distributed.rank() == 0 else None)
    yield Path(path)
    distributed.barrier()
    if distributed.rank() == 0:
        shutil.rmtree(path)


def _engine(stage, precision="fp32", universal=True, seed=5, **zero):
    if stage == 3:
        zero = {"stage3_param_persistence_threshold": 0, **zero}
    return ZeroEngine(
        tiny.Tiny(seed),
        tiny.groups,
        zero={"stage": stage, **zero},
        precision=precision,
        micro_batch=2,
        accumulation=2,
        clip=tiny.CLIP,
        optimizer=tiny.OPTIMIZER,
        extra={"checkpoint": {"load_universal": True}} if universal else None,
    )


def _saved(engine, folder, tag="t"):
    """Save as DeepSpeed does; the states as ZeroStore reads them, on rank 0."""
    states = {name: engine.state.read(name) for name in engine.state.shapes()}
    info = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
    engine._ds.save_checkpoint(str(folder), tag=tag, client_state=info)
    distributed.barrier()
    return states


def _assert_same(states, read):
    for name, state in states.items():
        other = read(name)
        for kind in KINDS:
            assert torch.equal(getattr(state, kind), getattr(other, kind)), (name, kind)
        assert state.step == other.step, name


def _deepspeed_converts(source, out):
    """DeepSpeed's own converter, in this process."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False}
    options |= {"strict": True, "inject_missing_state": False}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(input_folder=str(source), output_folder=str(out), **options))


def _copy_universal(source, out, zero):
    write_universal(
        out,
        source.shapes(),
        source.read,
        zero=zero,
        global_steps=source.global_steps,
        integer_steps=source.integer_steps,
        aliases=source.aliases,
    )


def case_rigid_folders_are_read():
    """Every stage and precision, two groups, 555 elements over 2 ranks, one-element parameters: as ZeroStore reads."""
    variants = [(stage, precision, {}) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
    variants += [(3, "fp32", {"sub_group_size": 300}), (2, "bf16", {"offload_optimizer": {"device": "cpu"}})]
    for stage, precision, options in variants:
        with shared_folder() as folder:
            engine = tiny.engine(stage, precision, **options)
            tiny.train(engine, 0, 2)
            states = _saved(engine, folder)
            engine.close()
            if distributed.rank() == 0:
                opened = open_rigid(folder)
                assert (opened.stage, opened.global_steps, opened.moments) == (stage, 2, True)
                assert opened.ranks == distributed.world_size()
                assert set(opened.shapes()) == set(states)
                assert opened.shapes()["layers.0.gain"] == (1,)
                _assert_same(states, opened.read)


def case_deepspeeds_converter_agrees():
    """Every tensor of DeepSpeed's universal folder equals ours, file by file, and reads as the state that was saved."""
    for stage, precision in CONVERTED:
        with shared_folder() as folder:
            engine = tiny.engine(stage, precision)
            tiny.train(engine, 0, 2)
            states = _saved(engine, folder)
            engine.close()
            if distributed.rank() == 0:
                _deepspeed_converts(folder / "t", folder / "theirs")
                _copy_universal(open_rigid(folder), folder / "ours", stage)
                ours = folder / "ours" / "global_step2" / "zero"
                _assert_same_files(folder / "theirs" / "zero", ours, set(states))
                _assert_same(states, open_universal(folder / "theirs").read)
                _assert_same(states, open_universal(folder).read)  # by its latest_universal
                _assert_same(states, open_universal(folder / "ours").read)


def _assert_same_files(theirs, ours, names):
    assert {path.name for path in theirs.iterdir() if path.is_dir()} == names
    assert {path.name for path in ours.iterdir() if path.is_dir()} == names
    for name in names:
        files = {path.name for path in (theirs / name).iterdir()}
        assert files == {path.name for path in (ours / name).iterdir()}
        assert files >= set(FILES.values())
        for file in files:
            pair = [torch.load(folder / name / file, weights_only=True) for folder in (theirs, ours)]
            if isinstance(pair[0], dict):
                assert pair[0].keys() == pair[1].keys()
                assert pair[0]["cat_dim"] == pair[1]["cat_dim"]
                pair = [held["param"] for held in pair]
            assert pair[0].dtype == pair[1].dtype == torch.float32
            assert pair[0].shape == pair[1].shape
            assert torch.equal(*pair), (name, file)


def _go_on(engine, folder):
    """Load a universal folder as a user does, and mend what DeepSpeed loses."""
    path, _ = engine._ds.load_checkpoint(str(folder))
    assert path is not None
    optimizer = engine._fragments.optimizer
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    for group, decay in zip(optimizer.param_groups, DECAYS, strict=True):
        group["weight_decay"] = decay
    steps = [state["step"] for state in optimizer.state.values()]
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()
    return decays, len({id(step) for step in steps})


def _assert_goes_on(engine, expected, end):
    """Two more steps as the engine that was never interrupted; the weights show a lost weight decay, losses do not."""
    losses = tiny.train(engine, 2, 4)
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-6, engine.stage
    for name, state in end.items():
        read = engine.state.read(name)
        assert read is None or read.step == state.step == 4
        assert read is None or torch.allclose(read.weight, state.weight, rtol=0, atol=1e-6), (engine.stage, name)


def case_deepspeed_loads_what_we_write():
    """One folder from stage 2 serves stages 1, 2 and 3, one in ZeRO-3's form stage 3: same state, same losses after."""
    whole = tiny.engine(2)
    tiny.train(whole, 0, 2)
    with shared_folder() as folder:
        states = _saved(whole, folder)
        if distributed.rank() == 0:
            for zero in (2, 3):
                _copy_universal(open_rigid(folder), folder / f"form{zero}", zero)
        distributed.barrier()
        expected = tiny.train(whole, 2, 4)
        end = {name: whole.state.read(name) for name in states}
        whole.close()
        for stage, form in [(1, 2), (2, 2), (3, 2), (3, 3)]:
            engine = _engine(stage)
            decays, tensors = _go_on(engine, folder / f"form{form}")
            assert decays == DECAYS  # a folder of ours says nothing of them, so ZeRO-3 has nothing to spread
            assert tensors == (1 if stage == 3 else 2)
            for name, state in states.items():
                read = engine.state.read(name)
                assert read is None or (state.step == read.step == 2), name
                assert read is None or all(torch.equal(getattr(read, kind), getattr(state, kind)) for kind in KINDS)
            engine.state.verify()
            _assert_goes_on(engine, expected, end)
            engine.close()


def case_deepspeed_itself_spreads_hyper_parameters():
    """The defects that the advice is for; when this fails, DeepSpeed is repaired and the advice can go."""
    whole = tiny.engine(3)
    tiny.train(whole, 0, 2)
    with shared_folder() as folder:
        _saved(whole, folder)
        if distributed.rank() == 0:
            _deepspeed_converts(folder / "t", folder / "theirs")
        distributed.barrier()
        expected = tiny.train(whole, 2, 4)
        end = {name: whole.state.read(name) for name in whole.state.shapes()}
        whole.close()
        engine = _engine(3)
        decays, tensors = _go_on(engine, folder)
        assert decays == [tiny.DECAY, tiny.DECAY]
        assert tensors == 1
        _assert_goes_on(engine, expected, end)
        engine.close()


def case_bf16_masters_come_back():
    """From stage 2 in bf16 to stages 1 and 3: masters and moments to the bit, the weights their rounding."""
    whole = tiny.engine(2, "bf16")
    tiny.train(whole, 0, 2)
    with shared_folder() as folder:
        states = _saved(whole, folder)
        whole.close()
        if distributed.rank() == 0:
            _copy_universal(open_rigid(folder), folder / "out", 1)
        distributed.barrier()
        for stage in (1, 3):
            engine = _engine(stage, "bf16")
            _go_on(engine, folder / "out")
            for name, state in states.items():
                read = engine.state.read(name)
                assert read is None or all(torch.equal(getattr(read, kind), getattr(state, kind)) for kind in KINDS)
            engine.state.verify()
            engine.close()


class _Plain(tiny.Tiny):
    """With what others' modules have: a buffer, a second name of the embedding, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(tiny.HIDDEN, tiny.VOCAB, bias=False)
        self.decoder.weight = self.word.weight
        self.register_buffer("ids", torch.arange(3))
        self.position.weight.requires_grad = False


def _train_plain(stage):
    """Two steps under DeepSpeed alone, with torch's AdamW and DeepSpeed's schedule."""
    import deepspeed

    module = _Plain()
    groups = [
        dict(group, params=[param for param in group["params"] if param.requires_grad]) for group in tiny.groups(module)
    ]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config, dist_init_required=False
    )
    for step in range(2):
        output = engine(tiny.micro_batches(step, distributed.rank(), distributed.world_size(), 1)[0])
        engine.backward(output["mlm"] + output["nsp"])
        engine.step()
    return engine


def case_frozen_tied_and_buffers():
    """Nothing but parameters, tied ones once, frozen ones without moments; from ZeRO-3 these are refused by name."""
    for stage in (0, 1, 2, 3):
        engine = _train_plain(stage)
        with shared_folder() as folder:
            engine.save_checkpoint(str(folder), tag="t")
            distributed.barrier()
            if distributed.rank() == 0 and stage == 3:
                with pytest.raises(UserError, match="was frozen, which"):
                    open_rigid(folder)
            elif distributed.rank() == 0:
                opened = open_rigid(folder)
                live = dict(engine.module.named_parameters())
                assert opened.aliases == {"decoder.weight": "word.weight"}
                assert set(opened.shapes()) == set(live)
                for name, param in live.items():
                    state = opened.read(name)
                    assert torch.equal(state.weight, param), (stage, name)
                    assert (state.exp_avg is None) == (name == "position.weight")
                    assert state.step == (0 if name == "position.weight" else 2)
        engine.destroy()


def case_round_robin_files_do_not_tell_the_truth():
    """Why they are refused; when this fails, DeepSpeed is repaired and the refusal can go."""
    import deepspeed

    module = tiny.Tiny()
    zero = {"stage": 2, "round_robin_gradients": True}
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero}
    optimizer = torch.optim.AdamW(tiny.groups(module), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)
    output = engine(tiny.micro_batches(0, distributed.rank(), distributed.world_size(), 1)[0])
    engine.backward(output["mlm"])
    engine.step()
    with shared_folder() as folder:
        engine.save_checkpoint(str(folder), tag="t")
        distributed.barrier()
        if distributed.rank() == 0 and distributed.world_size() > 1:
            with pytest.raises(UserError, match="saved with round_robin_gradients"):
                open_rigid(folder)
            info = ["universal_checkpoint_info", {"universal_checkpoint_version": 0.2}]
            file = folder / "t" / "mp_rank_00_model_states.pt"
            torch.save({**torch.load(file, weights_only=False), info[0]: info[1]}, file)
            _deepspeed_converts(folder / "t", folder / "theirs")
            held = torch.load(folder / "theirs" / "zero" / "nsp.weight" / "fp32.pt")["param"]
            assert not torch.equal(held, module.nsp.weight)
    engine.destroy()


def _bert():
    from transformers import BertConfig, BertForPreTraining

    torch.manual_seed(0)
    return BertForPreTraining(BertConfig(**names.config_of(TINY)))


def _train_bert(stage):
    """A transformers model under plain DeepSpeed with its usual two groups, two steps."""
    import deepspeed

    module = _bert()
    named = list(module.named_parameters())
    bare = [param for name, param in named if name.endswith("bias") or "LayerNorm" in name]
    rest = [param for name, param in named if not (name.endswith("bias") or "LayerNorm" in name)]
    groups = [{"params": rest, "weight_decay": 0.01}, {"params": bare, "weight_decay": 0.0}]
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config, dist_init_required=False
    )
    random = torch.Generator().manual_seed(distributed.rank())
    for _ in range(2):
        ids = torch.randint(0, 40, (2, 8), generator=random)
        loss = engine(input_ids=ids, labels=ids, next_sentence_label=torch.tensor([0, 1])).loss
        engine.backward(loss)
        engine.step()
    return engine


def case_hugging_face_model_becomes_a_checkpoint():
    """Weights as an import of the same module gives them; moments as the engine holds them, fused as the weights are.

    The model's sizes come from the config.json beside `latest`, as transformers' trainer leaves it.
    """
    from growth_ds.engine.fragments import for_engine
    from growth_ds.engine.zero_state import ZeroStore

    for stage in (2, 3):
        engine = _train_bert(stage)
        params = dict(engine.module.named_parameters())
        shapes = {name: tuple(param.ds_shape if stage == 3 else param.shape) for name, param in params.items()}
        store = ZeroStore(for_engine(engine, distributed.rank()), params, shapes)
        live = {name: store.read(name) for name in shapes}
        with shared_folder() as folder:
            engine.save_checkpoint(str(folder / "run"), tag="global_step2")
            distributed.barrier()
            if distributed.rank() == 0:
                _check_conversion(engine, live, folder)
        engine.destroy()


def _check_conversion(engine, live, folder):
    from growth_ds.checkpoint import Checkpoint
    from growth_ds.convert import convert
    from growth_ds.interop.huggingface import read_huggingface

    plain = _bert()
    plain.load_state_dict({name: state.weight for name, state in live.items()}, strict=False)
    plain.save_pretrained(folder / "hf")
    shutil.copyfile(folder / "hf" / "config.json", folder / "run" / "config.json")
    convert(folder / "run", folder / "made", to="checkpoint", model=None, zero=2, force=False, tokenizer=None)
    made, imported = Checkpoint(folder / "made"), read_huggingface(folder / "hf")
    assert made.model == imported.model
    assert made.facts["step"] == 2
    for name in made.shapes():
        state = made.read(name)
        assert torch.equal(state.weight, imported.weights[name]), name
        parts = [live[key] for key in names.their_names(made.model, name)]
        for kind in KINDS:
            assert torch.equal(getattr(state, kind), torch.cat([getattr(part, kind) for part in parts])), (name, kind)
        assert state.step == 2
        assert state.exp_avg.any() or "qkv.bias" in name
