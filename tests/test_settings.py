"""What the reader can set, and what the machine allows."""

import sys
import types

import pytest
import torch
from conftest import DEFAULTS, code_cells

WRONG = [
    ({"PRESET": "huge"}, "PRESET"),
    ({"TOKENIZER": "words"}, "TOKENIZER"),
    ({"MODEL": {"layers": 3}}, "layers"),
    ({"MODEL": {"n_embd": 100}}, "try n_embd = 102"),
    ({"MODEL": {"n_embd": 0}}, "n_embd"),
    ({"MODEL": {"n_embd": 1, "n_head": 1}}, "n_embd"),  # LayerNorm makes it zero
    ({"MODEL": {"n_layer": 2.0}}, "n_layer"),
    ({"MODEL": {"n_head": "6"}}, "n_head"),
    ({"MODEL": {"block_size": -1}}, "block_size"),
    ({"MODEL": {"vocab_size": 70_000}}, "vocab_size"),
    ({"MODEL": {"vocab_size": 256}}, "vocab_size"),
    ({"MODEL": {"dropout": 1.0}}, "dropout"),
    ({"MODEL": {"dropout": None}}, "dropout"),
    ({"MODEL": {"bias": 1}}, "bias"),
    ({"MODEL": {"tie_weights": "yes"}}, "tie_weights"),
    ({"MODEL": {"rope": True, "n_embd": 18, "n_head": 6}}, "even size; try n_embd = 24"),
    ({"TRAINING": {"lr": 0.1}}, "lr"),
    ({"TRAINING": {"learning_rate": 0}}, "learning_rate"),
    ({"TRAINING": {"learning_rate": "1e-3"}}, "learning_rate"),
    ({"TRAINING": {"learning_rate": 1e-4, "min_lr": 5e-4}}, "min_lr"),
    ({"TRAINING": {"learning_rate": float("nan")}}, "learning_rate"),
    ({"TRAINING": {"batch_size": 0}}, "batch_size"),
    ({"TRAINING": {"batch_size": 2.5}}, "batch_size"),
    ({"TRAINING": {"tokens_per_step": -5}}, "tokens_per_step"),
    ({"TRAINING": {"evaluations": 0}}, "evaluations"),
    ({"TRAINING": {"warmup_steps": -1}}, "warmup_steps"),
    ({"TRAINING": {"weight_decay": -0.1}}, "weight_decay"),
    ({"TRAINING": {"beta1": 1.0}}, "beta1"),
    ({"TRAINING": {"grad_clip": 0.0}}, "grad_clip"),
    ({"TRAINING": {"save_minutes": None}}, "save_minutes"),
    ({"TRAINING": {"precision": "int8"}}, "precision"),
    ({"TRAINING": {"optimizer": "sgd"}}, "optimizer"),
    ({"TRAINING": {"compile": "yes"}}, "compile"),
    ({"TRAINING": {"minutes": None}}, "minutes"),
    ({"MINUTES": 0}, "minutes"),
    ({"MINUTES": -3.5}, "minutes"),
    ({"MINUTES": float("inf")}, "minutes"),
    ({"MINUTES": True}, "MINUTES"),
    ({"MINUTES": "ten"}, "MINUTES"),
    ({"MAX_STEPS": 0}, "max_steps"),
    ({"MAX_STEPS": 10.5}, "MAX_STEPS"),
    ({"TRAIN": "no"}, "TRAIN"),
    ({"TRAIN": 1}, "TRAIN"),
    ({"RESUME": None}, "RESUME"),
    ({"SEED": 1.5}, "SEED"),
    ({"SEED": True}, "SEED"),
    ({"SEED": -1}, "SEED"),
    ({"SEED": 10**14}, "SEED"),
    ({"PROMPT": 5}, "PROMPT"),
    ({"MODEL": [1]}, "MODEL"),
    ({"WEIGHTS": None}, "WEIGHTS"),
    ({"DATASET": None}, "DATASET"),
]


@pytest.mark.parametrize("wrong, named", WRONG, ids=str)
def test_wrong_settings_are_refused_in_one_sentence_that_names_them(nb, wrong, named):
    with pytest.raises(nb.UserError) as caught:
        nb.resolve(nb.read_settings(DEFAULTS | {"PRESET": "slm"} | wrong, {}), cuda=False)
    sentence = str(caught.value)
    assert named in sentence and "\n" not in sentence and sentence.endswith(".")
    assert caught.value._render_traceback_() == [f"UserError: {sentence}"]


def settings(nb, outside=None, **here):
    return nb.read_settings(DEFAULTS | here, outside or {})


def test_the_environment_overrules_the_cell_and_says_so(nb, capsys):
    outside = {
        "SLM_PRESET": "tiny",
        "SLM_MODEL": '{"n_layer": 3}',
        "SLM_MINUTES": "2.5",
        "SLM_TRAIN": "False",
        "SLM_SEED": "7",
        "SLM_PROMPT": "[1]",
        "HOME": "not ours",
    }
    read = settings(nb, outside, MODEL={"n_layer": 9}, RESUME=False)
    assert read == DEFAULTS | {
        "PRESET": "tiny",
        "MODEL": {"n_layer": 3},
        "MINUTES": 2.5,
        "TRAIN": False,
        "SEED": 7,
        "PROMPT": "[1]",
        "RESUME": False,
    }
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and "TRAIN = False (from the environment)" in printed


def test_defaults_are_silent(nb, capsys):
    assert settings(nb) == DEFAULTS and not capsys.readouterr().out


@pytest.mark.parametrize(
    "name, value",
    [
        ("SLM_STEPS", "5"),
        ("SLM_MODEL", "{'n_layer': "),
        ("SLM_MODEL", "n_layer=2"),
        ("SLM_MODEL", "[1]"),
        ("SLM_MODEL", "{[1]: 2}"),
        ("SLM_TRAIN", "0"),
        ("SLM_TRAIN", "false"),
        ("SLM_SEED", "1e3"),
        ("SLM_MAX_STEPS", ""),
        ("SLM_MAX_STEPS", "__import__('os').getpid()"),
    ],
)
def test_wrong_variables_are_refused_by_name(nb, name, value):
    with pytest.raises(nb.UserError, match=name.removeprefix("SLM_")):
        settings(nb, {name: value})


def test_auto_is_slm_with_cuda_and_laptop_without(nb):
    assert nb.resolve(settings(nb), cuda=True)[0] == "slm"
    assert nb.resolve(settings(nb), cuda=False)[0] == "laptop"


def test_model_and_training_change_the_preset(nb):
    changes = {"MODEL": {"n_layer": 3}, "TRAINING": {"batch_size": 5}, "PRESET": "nano"}
    _, _, config, cfg = nb.resolve(settings(nb, **changes), cuda=False)
    assert (config.n_layer, config.n_embd, cfg.batch_size) == (3, 768, 5)
    assert cfg.tokens_per_step == nb.PRESETS["nano"]["training"]["tokens_per_step"]


@pytest.mark.parametrize(
    "budget, expected",
    [
        ({}, (60.0, 56_000)),
        ({"TRAINING": {"minutes": 30}}, (30, None)),
        ({"TRAINING": {"minutes": 30}, "MAX_STEPS": 7}, (30, 7)),
        ({"TRAINING": {"minutes": 30, "max_steps": 8}}, (30, 8)),
        ({"TRAINING": {"minutes": 30, "max_steps": 8}, "MINUTES": 5}, (5, None)),
        ({"TRAINING": {"max_steps": 8}}, (60.0, 8)),
        ({"MINUTES": 5}, (5, None)),
        ({"MAX_STEPS": 7}, (60.0, 7)),
        ({"MINUTES": 5, "MAX_STEPS": 7}, (5, 7)),
    ],
)
def test_the_budget_replaces_the_presets(nb, budget, expected):
    cfg = nb.resolve(settings(nb, PRESET="nano", **budget), cuda=False)[3]
    assert (cfg.minutes, cfg.max_steps) == expected


# The machine.
@pytest.mark.parametrize(
    "capability, dtype",
    [
        ((6, 0), torch.float16),
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((8, 9), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((12, 0), torch.bfloat16),
    ],
)
def test_bfloat16_on_cuda_from_capability_8_alone(nb, monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)  # a T4 says so
    chosen, reason = nb.choose_precision(torch.device("cuda"))
    assert chosen == dtype and ".".join(map(str, capability)) in reason


def test_float32_on_apple_gpus(nb):
    assert nb.choose_precision(torch.device("mps"))[0] == torch.float32


@pytest.mark.parametrize(
    "float32, bfloat16, dtype",
    [
        ([1.0] * 10, [0.5] * 10, torch.bfloat16),
        ([0.5] * 10, [1.0] * 10, torch.float32),
        ([1.0] * 10, [9.0] * 9 + [0.5], torch.bfloat16),  # beside other programs
    ],
    ids=["bfloat16 faster", "float32 faster", "bfloat16 interrupted"],
)
def test_the_cpu_takes_the_faster_format(nb, monkeypatch, float32, bfloat16, dtype):
    times, clock = iter([0.0, *bfloat16, 0.0, *float32]), [0.0]

    def perf_counter():  # each call takes the next of these times
        if perf_counter.running:
            clock[0] += next(times)
        perf_counter.running = not perf_counter.running
        return clock[0]

    perf_counter.running = False
    monkeypatch.setattr(nb.time, "perf_counter", perf_counter)
    assert nb.choose_precision(torch.device("cpu"))[0] == dtype


def test_a_wish_is_followed_and_float16_without_cuda_refused(nb):
    cpu = torch.device("cpu")
    for name in ("float32", "bfloat16"):
        assert nb.choose_precision(cpu, name)[0] == getattr(torch, name)
    for device in (cpu, torch.device("mps")):
        with pytest.raises(nb.UserError, match="float16"):
            nb.choose_precision(device, "float16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_scaled_in_float16_alone(nb, dtype):
    cpu = torch.device("cpu")
    machine = nb.Machine(cpu, dtype, "")
    assert not machine.scaler().is_enabled()
    with machine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
    assert nb.Machine(cpu, torch.float16, "").scaler().is_enabled()


def test_a_gpu_that_cannot_compute_is_not_used_and_chooses_no_preset(
    nb, monkeypatch, capsys, tmp_path
):
    def no_kernel(*_, **options):
        raise RuntimeError("no kernel image is available\nand so on")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    monkeypatch.setattr(torch, "ones", no_kernel)
    assert nb.choose_device().type in ("cpu", "mps")
    assert "no kernel image is available)" in capsys.readouterr().out
    assert settings_cell(nb, tmp_path)["preset_name"] == "laptop"


def settings_cell(nb, folder) -> dict:
    """What the cells that read the settings define."""
    names = vars(nb) | DEFAULTS | {"FOLDER": str(folder)}
    for cell in code_cells():
        if "def read_settings" in cell or "SETTINGS = read_settings" in cell:
            exec(cell, names)
    return names


def test_only_torchrun_makes_several_processes(nb, monkeypatch, tmp_path):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)  # as a cluster's job leaves them
    for launched, expected in ((False, (0, 1, 0)), (True, (0, 2, 1))):
        if launched:
            monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        names = settings_cell(nb, tmp_path)
        assert (names["RANK"], names["WORLD"], names["LOCAL_RANK"]) == expected
    monkeypatch.setattr(nb, "IN_NOTEBOOK", True)  # started beside torchrun, not by it
    assert settings_cell(nb, tmp_path)["WORLD"] == 1


def test_drive_is_mounted_only_when_asked_and_only_on_colab(nb, tmp_path, monkeypatch):
    with pytest.raises(nb.UserError, match="Google Colab alone"):
        nb.open_folder("drive")
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    monkeypatch.setattr(nb, "DRIVE", str(tmp_path / "drive"))
    assert nb.open_folder(str(tmp_path / "here")) == tmp_path / "here" and not mounted
    folder = nb.open_folder("drive")
    assert mounted == [nb.DRIVE] and folder.is_dir() and folder.parent.name == "MyDrive"


def test_a_folder_that_cannot_be_written_is_refused(nb, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(nb.UserError, match="cannot be written"):
        nb.open_folder(str(tmp_path / "file"))
