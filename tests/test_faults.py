"""Faults, made on purpose: killed processes, full disks, dead networks, cells run twice."""

import contextlib
import http.server
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
from functools import partial
from pathlib import Path

import huggingface_hub
import nbformat
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import NOTEBOOK, load_notebook, small_data, twenty_steps
from test_notebook import SMALL, launch, script  # noqa: F401 (script is a fixture)
from test_training import at_step, in_one_go, moments, same, weights  # noqa: F401

HERE = str(Path(__file__).parent)


# Killed processes. A nursery is a process that has loaded the notebook once; each attempt is a
# child forked from it, so that an attempt takes a second and not the start of PyTorch as well.
PHASES = ("tokenizer", "preparation", "training")
FILES = ("tokenizer.json", "train.json", "train.bin", "validation.json", "validation.bin")
FILES += ("best_model_params.pt", "last.pt")


def write_stories(nb, folder: Path):
    """A dataset folder with both splits."""
    folder.mkdir()
    for split, n, seed in (("train", 3_000, 1), ("valid", 200, 2)):
        (folder / f"{split}.txt").write_text(nb.EOT.join(nb.practice_corpus(n, seed)[0]))


def from_stories_to_weights(nb, home: Path, tell=lambda phase: None):
    """What Steps 2 to 10 do, with a small model that is saved after each step."""
    cpu = nb.Machine(torch.device("cpu"), torch.float32, "test")
    source = nb.file_source(home.parent / "stories")
    tell("tokenizer")
    sample = nb.first_stories(source, "train", 20_000_000)
    tokenizer = nb.own_tokenizer(home / "tokenizer.json", sample, 400, source.identity)
    tell("preparation")
    (train, _), (val, _) = nb.prepare(source, tokenizer, home).values()
    tell("training")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "dropout": 0.1}
    config = nb.GPTConfig(vocab_size=tokenizer.n_vocab, **shape)
    plan = {"max_steps": 40, "tokens_per_step": 256, "batch_size": 4, "warmup_steps": 4}
    cfg = nb.TrainConfig(**plan, evaluations=4, save_minutes=1e-9)
    run = nb.open_run(home, config, cfg, tokenizer, cpu, 1, source.identity)
    nb.plan_run(run, train, val)
    nb.train(run, train, val)


def attempt(nb, home: Path, prepare=lambda: None, phase=None, delay=0.0) -> tuple[int, dict]:
    """Run all of it in a child, killed `delay` seconds after the phase begins where one is given.

    Returns how it ended (0, or minus the signal) and when each phase began.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            prepare()
            from_stories_to_weights(nb, home, lambda name: os.write(write, f"{name}\n".encode()))
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    os.close(write)
    began = {}
    with os.fdopen(read) as told:
        for line in told:
            began[line.strip()] = time.perf_counter()
            if line.strip() == phase:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
    began["end"] = time.perf_counter()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), began


def assert_nothing_half(nb, home: Path):
    """What stands there under its final name is whole, whatever happened."""
    for path in home.glob("*.pt"):
        nb.load_checkpoint(path)  # raises if it is not
    for path in home.glob("*.json"):
        json.loads(path.read_text())


def at_rename(name: str, nth: int, after: bool):
    """Die just before or just after the nth renaming of a file, counted from 0."""
    replace, done = os.replace, []

    def deadly(source, target):
        done.append(Path(target).name)
        now = done[-1] == name and done.count(name) > nth
        if now and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = deadly


def at_byte(nb, name: str, n_bytes: int):
    """Die when byte `n_bytes` of the file has been written: the kernel's own file size limit."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    plain = io.open

    def limited(path, *args, **kwargs):
        if str(path).endswith(".tmp"):
            size = n_bytes if str(path).endswith(f"{name}.tmp") else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return plain(path, *args, **kwargs)

    nb.open = io.open = limited


def nursery(folder: Path, kind: str, n: int):
    """Kill and start again until it is done, in folders 0, 1, ...; prints a line per kill."""
    nb, rng = load_notebook(), random.Random(2024)
    torch.set_num_threads(1)

    def killed(home, told, **how):
        status, _ = attempt(nb, home, **how)
        if status:
            assert status in (-signal.SIGKILL, -signal.SIGXFSZ), f"{told}: {status}"
            names = sorted(path.name for path in home.glob("*"))
            print(json.dumps({"home": home.name, "killed": told, "files": names}), flush=True)
        assert_nothing_half(nb, home)

    def finished(home):
        assert attempt(nb, home)[0] == 0

    first = folder / "undisturbed"
    status, began = attempt(nb, first)
    assert status == 0
    moments = [began[name] for name in (*PHASES, "end")]
    seconds = {name: b - a for name, a, b in zip(PHASES, moments, moments[1:])}
    if kind == "random":
        for i in range(n):
            home = folder / str(i)
            for phase in (*PHASES[:2], *PHASES[1:], "training"):
                delay = rng.uniform(0, seconds[phase])
                killed(home, phase, phase=phase, delay=delay)
            finished(home)
    elif kind == "renames":
        for name in FILES:
            home = folder / name.replace(".", "-")
            for nth in range(n if name in FILES[5:] else 1):  # the last three come again and again
                for after in (False, True):
                    told = f"{name} {nth} {'after' if after else 'before'}"
                    killed(home, told, prepare=partial(at_rename, name, nth, after))
            finished(home)
    elif kind == "bytes":
        for i, name in enumerate(FILES):
            home, size = folder / str(i), (first / name).stat().st_size
            for part in (0, size // 2, size * 9 // 10)[:n]:
                killed(home, f"{name} {part}", prepare=partial(at_byte, nb, name, part))
            finished(home)


def whole_end(home: Path) -> dict:
    """All that a run leaves, without the clock."""
    names = [name for name in FILES if name != "last.pt"]
    end = {name: (home / name).read_bytes() for name in names}
    last = torch.load(home / "last.pt", weights_only=True)
    end["weights"], end["moments"] = (
        dict(last["model"]),
        {
            (i, p, key): torch.as_tensor(value)
            for i, optimizer in enumerate(last["optimizer"])
            for p, state in optimizer.items()
            for key, value in state.items()
        },
    )
    end["plain"] = [last[key] for key in ("step", "max_steps", "identity", "budget")]
    end["steps"] = [step[:3] for step in last["steps"]]
    times = ("seconds",)
    end["evaluations"] = [
        {key: value for key, value in e.items() if key not in times} for e in last["evaluations"]
    ]
    return end


def assert_same_end(one: Path, other: Path):
    a, b = whole_end(one), whole_end(other)
    assert a["plain"][0] == a["plain"][1] == len(a["steps"]) >= 40 and a["moments"]
    for key in ("weights", "moments"):
        assert same(a.pop(key), b.pop(key)), f"{other.name}: {key}"
    for key, value in a.items():
        assert b[key] == value, f"{other.name}: {key}"


KILLS = [("random", 6, 20), ("renames", 2, 22), ("bytes", 3, 24)]


@pytest.mark.slow
@pytest.mark.parametrize("kind, n, at_least", KILLS, ids=[kind for kind, *_ in KILLS])
def test_kills_at_any_moment_lose_nothing(nb, tmp_path, kind, n, at_least):
    """Processes die by SIGKILL; others go on; the end is that of an undisturbed run, bit by bit."""
    write_stories(nb, tmp_path / "stories")
    command = "import sys; sys.path.insert(0, sys.argv[1]); import test_faults as t; "
    command += "t.nursery(t.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))"
    command = [sys.executable, "-c", command, HERE, str(tmp_path), kind, str(n)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2_000:] + done.stderr[-2_000:]
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"home"')]
    assert len(kills) >= at_least, [kill["killed"] for kill in kills]
    if kind == "random":
        assert {kill["killed"] for kill in kills} == set(PHASES)
    if kind == "bytes":
        hit = {kill["killed"].split()[0] for kill in kills}
        assert hit == set(FILES) and all(any(".tmp" in f for f in kill["files"]) for kill in kills)
    homes = [path for path in tmp_path.iterdir() if path.name not in ("stories", "undisturbed")]
    print(f"{len(kills)} kills in {len(homes)} runs:", [kill["killed"] for kill in kills])
    for home in homes:
        assert_same_end(tmp_path / "undisturbed", home)


PROGRAM = {
    "TOKENIZER": "bpe",
    "MODEL": {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 32, "vocab_size": 400},
    "MAX_STEPS": 60,
    "TRAINING": {
        "save_minutes": 1e-9,
        "evaluations": 10,
        "tokens_per_step": 256,
        "batch_size": 4,
        "precision": "float32",
    },
}


@pytest.mark.slow
def test_the_whole_program_survives_kills_at_random_moments(nb, script, tmp_path):  # noqa: F811
    write_stories(nb, tmp_path / "stories")
    settings = PROGRAM | {"DATASET": tmp_path / "stories"}
    environment = os.environ | {f"SLM_{name}": str(value) for name, value in settings.items()}
    rng, command = random.Random(7), [sys.executable, str(script)]
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    start = time.perf_counter()
    launch(command, tmp_path / "undisturbed", settings)
    seconds, kills = time.perf_counter() - start, 0
    for i in range(6):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=tmp_path / "killed", env=environment, **quiet)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.15 + 0.1 * i, 0.3 + 0.12 * i) * seconds)  # later and later
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        for path in (tmp_path / "killed").rglob("*.pt"):
            nb.load_checkpoint(path)
    launch(command, tmp_path / "killed", settings)
    print(f"{kills} kills of the whole program")
    assert kills >= 3  # the later ones may have come too late, on a machine that became faster
    ends = []
    for name in ("undisturbed", "killed"):
        (data,), (run,) = (tmp_path / name / "data").iterdir(), (tmp_path / name / "runs").iterdir()
        (home := tmp_path / f"end of {name}").mkdir()
        for path in (p for folder in (data, run) for p in folder.iterdir() if p.is_file()):
            shutil.copy(path, home)
        ends.append(home)
    assert_same_end(*ends)


# Full disks, and disks that cannot be written.
def mounted(folder: Path, options: str):
    """Mount a tmpfs there, or skip the test."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")


@pytest.fixture
def disk(tmp_path):
    """`disk(n)` mounts an empty disk of n bytes (whole pages) and returns its folder."""
    folder = tmp_path / "disk"

    def mount(n_bytes: int) -> Path:
        mounted(folder, f"size={-(-n_bytes // 4096) * 4096}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path):
    """Take up all that is left of a small disk."""
    with open(folder / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@contextlib.contextmanager
def files_up_to(n_bytes: int):
    """Writing more than n_bytes into any file fails, for anybody: a real OSError from the kernel."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


NO_ROOM = "could not be written.*(No space left|File too large|unexpected pos|file write)"


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.name != "ballast")


@pytest.mark.parametrize("room", [1, 100, 60_000])
def test_a_limit_met_while_writing_the_token_file_leaves_nothing(
    nb, tokenizer, stories, stream, tmp_path, room
):
    path = tmp_path / "data" / "train.bin"
    assert room < stream.nbytes
    with files_up_to(room), pytest.raises(nb.UserError, match=NO_ROOM):
        nb.write_tokens(nb.in_batches(stories), tokenizer, path, None, "")
    assert left_in(path.parent) == []
    nb.write_tokens(nb.in_batches(stories), tokenizer, path, None, "")
    assert path.read_bytes() == stream.tobytes()


def test_a_full_disk_met_while_writing_the_token_file_leaves_nothing(
    nb, disk, tokenizer, stories, stream
):
    path = disk(stream.nbytes // 2) / "train.bin"
    with pytest.raises(nb.UserError, match="No space left"):
        nb.write_tokens(nb.in_batches(stories), tokenizer, path, None, "")
    assert left_in(path.parent) == []


def test_a_disk_with_room_for_the_token_file_but_not_its_json_is_not_left_full(
    nb, disk, tokenizer, stories, stream
):
    """A gigabyte under a temporary name would keep the disk full for whoever tries again."""
    path = disk(stream.nbytes) / "train.bin"
    with pytest.raises(nb.UserError, match="No space left"):
        nb.write_tokens(nb.in_batches(stories), tokenizer, path, None, "")
    assert left_in(path.parent) == []


def test_a_full_disk_while_writing_again_keeps_no_false_token_file(
    nb, disk, tokenizer, stories, stream
):
    folder = disk(int(1.5 * stream.nbytes) + 12_288)
    first = nb.Source("x", "", "first", lambda split: nb.in_batches(stories[:2]))
    nb.prepare(first, tokenizer, folder)
    second = nb.Source("x", "", "second", lambda split: nb.in_batches(stories))
    with pytest.raises(nb.UserError, match="No space left"):
        nb.prepare(second, tokenizer, folder)
    for split in ("train", "validation"):
        found = nb.read_tokens(folder / f"{split}.bin", tokenizer, "second")
        assert found is None or found[0].tobytes() == stream.tobytes()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("how", ["limit", "disk"])
def test_no_room_for_the_tokenizer_is_a_sentence_and_leaves_nothing(
    nb, disk, stories, tmp_path, how
):
    folder = disk(4_096) if how == "disk" else tmp_path
    if how == "disk":
        fill(folder)
    room = files_up_to(100) if how == "limit" else contextlib.nullcontext()
    with room, pytest.raises(nb.UserError, match=NO_ROOM):
        nb.own_tokenizer(folder / "data" / "tokenizer.json", stories[:50], 300, "")
    assert left_in(folder / "data") == []
    with contextlib.suppress(OSError):
        (folder / "ballast").unlink()
    again = nb.own_tokenizer(folder / "data" / "tokenizer.json", stories[:50], 300, "")
    assert again.merges == nb.train_bpe(stories[:50], 300).merges


@pytest.mark.parametrize("how", ["limit", "disk"])
@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 0.9])
def test_no_room_for_a_checkpoint_keeps_the_earlier_one(
    nb, disk, small_model, tokenizer, tmp_path, how, part
):
    nb.save_checkpoint(tmp_path / "model.pt", small_model(), tokenizer, {"step": 1})
    size = (tmp_path / "model.pt").stat().st_size
    folder = disk(int((1 + part) * size)) if how == "disk" else tmp_path
    path = folder / "model.pt"
    nb.save_checkpoint(path, small_model(), tokenizer, {"step": 1})
    before = path.read_bytes()
    room = files_up_to(int(part * size)) if how == "limit" else contextlib.nullcontext()
    with room, pytest.raises(nb.UserError, match=NO_ROOM):
        nb.save_checkpoint(path, small_model(), tokenizer, {"step": 2})
    assert path.read_bytes() == before and nb.load_model(path)[2]["metrics"] == {"step": 1}
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("how", ["limit", "disk"])
def test_a_run_whose_disk_fills_stops_with_a_sentence_and_goes_on_later(
    nb,
    disk,
    in_one_go,  # noqa: F811
    tmp_path,
    monkeypatch,
    how,
):
    folder = (disk(20_000_000) if how == "disk" else tmp_path) / "run"
    room = contextlib.ExitStack()
    with monkeypatch.context() as patch, room:
        if how == "disk":
            at_step(nb, patch, 13, lambda: fill(folder))
        else:
            at_step(nb, patch, 13, lambda: room.enter_context(files_up_to(5_000)))
        with pytest.raises(nb.UserError, match=NO_ROOM):
            twenty_steps(nb, folder)
    assert nb.load_checkpoint(folder / "last.pt")["step"] == 10
    assert not list(folder.glob("*.pt.tmp"))
    (folder / "ballast").unlink(missing_ok=True)
    resumed = twenty_steps(nb, folder)
    assert same(weights(resumed), weights(in_one_go))
    assert same(moments(resumed.optimizers), moments(in_one_go.optimizers))


@pytest.fixture
def read_only(nb, disk, small_model, tokenizer, stories):
    """A disk with a tokenizer, a token stream, a checkpoint and a killed writer's leavings, read-only."""
    folder = disk(20_000_000)
    nb.own_tokenizer(folder / "tokenizer.json", stories[:50], 300, "text")
    nb.write_tokens([stories[:5]], tokenizer, folder / "train.bin", None, "text")
    nb.save_checkpoint(folder / "model.pt", small_model(), tokenizer, {"step": 1})
    for name in ("tokenizer.json", "train.bin", "model.pt"):
        (folder / f"{name}.tmp").write_text("half")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    return folder


def test_a_read_only_disk_is_refused_in_a_sentence_at_every_door(
    nb, read_only, small_model, tokenizer, stories
):
    before = {path.name: path.read_bytes() for path in read_only.iterdir()}
    with pytest.raises(nb.UserError, match="cannot be written"):
        nb.open_folder(str(read_only))
    with pytest.raises(nb.UserError, match="Read-only"):
        nb.own_tokenizer(read_only / "tokenizer.json", stories[:50], 300, "other text")
    with pytest.raises(nb.UserError, match="Read-only"):
        nb.write_tokens([stories[:5]], tokenizer, read_only / "train.bin", None, "text")
    with pytest.raises(nb.UserError, match="Read-only"):
        nb.save_checkpoint(read_only / "model.pt", small_model(rope=True), tokenizer, {})
    assert {path.name: path.read_bytes() for path in read_only.iterdir()} == before


def test_what_a_read_only_disk_holds_can_be_used(nb, read_only, tokenizer, stories, capsys):
    assert nb.load_model(read_only / "model.pt")[2]["metrics"] == {"step": 1}
    assert nb.read_tokens(read_only / "train.bin", tokenizer, "text")[1]["stories"] == 5
    nb.own_tokenizer(read_only / "tokenizer.json", stories[:50], 300, "text")
    assert "reusing" in capsys.readouterr().out


# The network.
STORIES = [f"story {i}" for i in range(5_000)]


@pytest.fixture
def hub(nb, monkeypatch):
    """`hub(error, after)`: a hub whose answers break off after so many batches (None: never)."""
    datasets = pytest.importorskip("datasets")

    class Broken:
        def __init__(self, data, error, after):
            self.data, self.error, self.after = data, error, after

        def iter(self, batch_size):
            for i, batch in enumerate(self.data.iter(batch_size)):
                if i == self.after:
                    raise self.error
                yield batch

    def become(error=None, after=None, splits=("train", "validation")):
        def load_dataset(name, revision, split, streaming):
            if after == "load" and split in splits:
                raise error
            data = datasets.Dataset.from_dict({"text": STORIES})
            data = data.to_iterable_dataset() if streaming else data
            return Broken(data, error, after) if split in splits else data

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    monkeypatch.setattr(nb, "HUB_STORIES", {"train": 5_000, "validation": 5_000})
    return become


@pytest.mark.parametrize("limit", [None, 1, 1_999, 2_000, 2_001, 4_500])
def test_the_hub_gives_exactly_as_many_stories_as_asked(nb, hub, limit):
    hub()
    source = nb.hub_source(limit)
    batches = list(source.batches("train"))
    assert [s for batch in batches for s in batch] == STORIES[:limit]
    assert all(batches) and source.totals["train"] == len(STORIES[:limit])


# What the libraries were seen to raise where a network or a file in it breaks, or may raise.
KINDS = """builtins.ConnectionError builtins.TimeoutError builtins.EOFError ssl.SSLError
socket.gaierror zlib.error http.client.IncompleteRead requests.ConnectionError
requests.exceptions.ChunkedEncodingError urllib3.exceptions.ProtocolError httpx.ConnectError
httpx.ReadTimeout httpx.RemoteProtocolError httpx2.ConnectError httpx2.ReadTimeout
httpx2.RemoteProtocolError aiohttp.ClientError aiohttp.ClientPayloadError
huggingface_hub.errors.HfHubHTTPError huggingface_hub.errors.LocalEntryNotFoundError
huggingface_hub.errors.EntryNotFoundError huggingface_hub.errors.OfflineModeIsEnabled
huggingface_hub.errors.XetDownloadError huggingface_hub.errors.GatedRepoError
datasets.exceptions.DatasetNotFoundError datasets.exceptions.DatasetGenerationError
datasets.exceptions.NonMatchingSplitsSizesError pyarrow.lib.ArrowInvalid""".split()


def an_error(name: str) -> Exception:
    """An exception of that kind, whatever its constructor asks for; skips where there is none."""
    module, _, kind = name.rpartition(".")
    kind = getattr(pytest.importorskip(module), kind, None)
    if kind is None:
        pytest.skip(f"no {name} in this version")
    try:
        return kind("the line is dead")
    except TypeError:  # wants the answer of a server as well
        error = kind.__new__(kind)
        error.args = ("the line is dead",)
        return error


@pytest.mark.parametrize("limit", [None, 4_500])
@pytest.mark.parametrize("after", ["load", 0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_network_is_a_sentence_and_leaves_no_token_file(
    nb, hub, tokenizer, tmp_path, kind, after, limit
):
    hub(an_error(kind), after)
    with pytest.raises(nb.UserError, match="TinyStories could not be fetched") as caught:
        nb.prepare(nb.hub_source(limit), tokenizer, tmp_path)
    assert 'DATASET = "practice"' in str(caught.value)
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("limit", [None, 4_500])
def test_when_the_network_is_back_it_goes_on_and_gives_the_same_token_files(
    nb, hub, tokenizer, tmp_path, limit, capsys
):
    hub()
    nb.prepare(nb.hub_source(limit), tokenizer, tmp_path / "undisturbed")
    hub(ConnectionError("gone"), 1, splits=("validation",))
    with pytest.raises(nb.UserError):
        nb.prepare(nb.hub_source(limit), tokenizer, tmp_path / "cut")
    hub()
    capsys.readouterr()
    nb.prepare(nb.hub_source(limit), tokenizer, tmp_path / "cut")
    assert "train.bin: reusing" in capsys.readouterr().out
    for name in FILES[1:5]:
        one, other = (tmp_path / folder / name for folder in ("undisturbed", "cut"))
        assert one.read_bytes() == other.read_bytes()
    assert not list((tmp_path / "cut").glob("*.tmp"))


class SmallHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as `datasets` asks for; `server.mode` says how it answers a download."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, body=b"", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("X-Repo-Commit", self.server.revision)
        self.end_headers()
        if self.command != "HEAD":
            self.send(body)

    def send(self, body):
        mode = self.server.mode if len(body) > 10_000 else "well"
        if mode == "garbage":
            body = b"x" * len(body)
        with contextlib.suppress(OSError):
            self.wfile.write(body if mode in ("well", "garbage") else body[: len(body) // 2])
            self.wfile.flush()
        if mode in ("cut", "gone"):  # gone: and from now on nobody answers
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            if mode == "gone":
                self.server.socket.close()
        elif mode == "hang":
            self.server.released.wait(60)

    def do_GET(self):
        path, _, query = urllib.parse.unquote(self.path).partition("?")
        files = self.server.files
        entries = [{"type": "file", "oid": f, "size": len(files[f]), "path": f} for f in files]
        if "/resolve/" in path and (name := path.split("/resolve/")[1].split("/", 1)[1]) in files:
            data, etag = files[name], f'"{name[-20:].replace("/", "-")}"'
            if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
                start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
                span = f"bytes {start}-{end}/{len(data)}"
                part = data[start : end + 1]
                return self.answer(part, 206, ETag=etag, Content_Range=span, Accept_Ranges="bytes")
            return self.answer(data, ETag=etag, Accept_Ranges="bytes")
        if "/resolve/" in path:
            return self.answer(status=404, X_Error_Code="EntryNotFound")
        if "/tree/" in path and not path.rstrip("/").endswith("data"):
            entries = [{"type": "directory", "oid": "1", "size": 0, "path": "data"}]
        elif "/tree/" not in path:
            siblings = [{"rfilename": name} for name in files]
            entries = {"id": "x", "_id": "1", "sha": self.server.revision, "siblings": siblings}
            entries |= {"private": False, "disabled": False, "gated": False, "tags": []}
        self.answer(json.dumps(entries).encode(), Content_Type="application/json")

    do_HEAD = do_GET


@contextlib.contextmanager
def small_hub(nb, mode: str):
    """The address of a hub with 3,000 stories per split, on this machine."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SmallHub)
    server.daemon_threads, server.mode, server.files = True, mode, {}
    server.revision, server.released = nb.HUB_REVISION, threading.Event()
    for seed, split in enumerate(("train", "validation")):
        table = pyarrow.table({"text": nb.practice_corpus(3_000, seed)[0]})
        pyarrow.parquet.write_table(table, written := io.BytesIO(), row_group_size=500)
        server.files[f"data/{split}-00000-of-00001.parquet"] = written.getvalue()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


FROM_THE_HUB = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import load_notebook
import os
del os.environ["HF_HUB_OFFLINE"]
time.sleep = lambda seconds: None  # the libraries wait between their attempts, up to ten minutes

nb = load_notebook()
sys.excepthook = nb.explain
nb.HUB_STORIES.update(train=3_000, validation=3_000)
stories = nb.practice_corpus(50, 9)[0]
nb.prepare(nb.hub_source(eval(sys.argv[3])), nb.train_bpe(stories, 300), Path(sys.argv[2]))
"""


def fetch(nb, folder: Path, mode: str, limit) -> subprocess.CompletedProcess:
    """Prepare both splits from a small hub, in a fresh process with its own cache."""
    with small_hub(nb, mode) as address:
        names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy")
        environment = {k: v for k, v in os.environ.items() if k not in names}
        environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}
        environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", FROM_THE_HUB, HERE, str(folder), str(limit)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def fetched(nb, tmp_path_factory):
    """`fetched[limit]`: a folder with the streams that a healthy hub gives."""
    pytest.importorskip("datasets")
    folders = {}
    for limit in (None, 2_500):
        folders[limit] = tmp_path_factory.mktemp("fetched")
        done = fetch(nb, folders[limit], "well", limit)
        assert done.returncode == 0, done.stderr[-1_500:]
    return folders


BREAKS = [(mode, limit) for mode in ("cut", "gone", "garbage") for limit in (None, 2_500)]


@pytest.mark.slow
@pytest.mark.parametrize("mode, limit", [*BREAKS, ("hang", None)])
def test_a_download_that_breaks_is_a_sentence_and_the_next_one_is_right(
    nb, fetched, tmp_path, mode, limit
):
    done = fetch(nb, tmp_path, mode, limit)
    assert "UserError: TinyStories could not be fetched" in done.stderr, done.stderr[-1_500:]
    assert "Traceback" not in done.stderr and done.returncode == 1
    assert not list(tmp_path.glob("*.bin"))
    if mode == "garbage":  # it was kept as the answer, and would be asked for no more
        shutil.rmtree(tmp_path / "cache")
    done = fetch(nb, tmp_path, "well", limit)
    assert done.returncode == 0, done.stderr[-1_500:]
    for name in FILES[1:5]:
        assert (tmp_path / name).read_bytes() == (fetched[limit] / name).read_bytes()


@pytest.fixture
def online(monkeypatch):
    """`online(address)`: Hugging Face's client asks there."""
    constants = huggingface_hub.constants

    def become(address):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("NO_PROXY", "*")

    return become


@pytest.mark.parametrize(
    "answer",
    [b"hello\r\n\r\n", b"", b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n"],
)
def test_a_hub_that_answers_nonsense_is_a_hub_that_cannot_be_reached(nb, online, answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                connection.recv(1_000)
                connection.sendall(answer)
                connection.close()

        threading.Thread(target=reply, daemon=True).start()
        online(f"http://127.0.0.1:{server.getsockname()[1]}")
        why = nb.hub_refusal(seconds=3.0)
        assert why and "\n" not in why and ("429" in why) == (b"429" in answer)


@pytest.mark.parametrize("address", ["nonsense", "", "http://", "http://[", "http://no.such.host."])
def test_a_wrong_address_of_the_hub_is_one_that_cannot_be_reached(nb, online, address):
    online(address)
    assert nb.hub_refusal(seconds=3.0)


def test_a_hub_that_answers_well_is_used(nb, online):
    with small_hub(nb, "well") as address:
        online(address)
        assert nb.hub_refusal() is None


# Interrupts where no GracefulInterrupt waits for them.
def interrupted(batches, after: int):
    for i, batch in enumerate(batches):
        if i == after:
            os.kill(os.getpid(), signal.SIGINT)
        yield batch


@pytest.mark.parametrize("after", [0, 1, 20, 59])
def test_an_interrupted_preparation_is_no_token_file_and_the_next_one_is_right(
    nb, tokenizer, stories, stream, tmp_path, after
):
    pieces, now = [stories[i : i + 5] for i in range(0, 300, 5)], [after]
    source = nb.Source("x", "", "text", lambda split: interrupted(pieces, now[0]))
    with pytest.raises(KeyboardInterrupt):
        nb.prepare(source, tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    now[0] = None
    for tokens, meta in nb.prepare(source, tokenizer, tmp_path).values():
        assert tokens.tobytes() == stream.tobytes() and meta["stories"] == 300
    assert not list(tmp_path.glob("*.tmp"))


def test_an_interrupt_in_the_middle_of_a_save_keeps_the_earlier_file(
    nb, small_model, tokenizer, tmp_path, monkeypatch
):
    path = tmp_path / "model.pt"
    nb.save_checkpoint(path, small_model(), tokenizer, {"step": 1})
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nb.os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGINT))
        nb.save_checkpoint(path, small_model(), tokenizer, {"step": 2})
    assert path.read_bytes() == before
    nb.save_checkpoint(path, small_model(), tokenizer, {"step": 2})
    assert nb.load_model(path)[2]["metrics"] == {"step": 2}
    assert left_in(tmp_path) == ["model.pt"]


def test_an_interrupt_stops_the_rehearsal_too(nb, tmp_path, monkeypatch):
    """`train` takes an interrupt for a polite end; the resume_check must not compare half a run."""
    _, tokenizer, stream = small_data(nb)
    shape = {"block_size": 32, "n_layer": 1, "n_head": 1, "n_embd": 32}
    names = {"tokenizer": tokenizer, "train_tokens": stream, "val_tokens": stream, "SEED": 1}
    names["tiny_config"] = nb.GPTConfig(vocab_size=tokenizer.n_vocab, **shape)
    for name, value in names.items():
        monkeypatch.setattr(nb, name, value, raising=False)
    with monkeypatch.context() as patch:
        at_step(nb, patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            nb.resume_check([6], tmp_path / "one")
    one, two = nb.resume_check([6], tmp_path / "two"), nb.resume_check([3, 6], tmp_path / "three")
    assert all(map(torch.equal, one, two))


# Cells run again, in the same kernel.
PROBE = '''
def _probe():
    """Digests of what the cells have made, and what of the machine they hold."""
    import gc, hashlib, resource, threading

    def digest(value):
        if isinstance(value, torch.Tensor):
            return digest(value.detach().float().cpu().numpy())
        if isinstance(value, np.ndarray):
            value = np.ascontiguousarray(value)
            return hashlib.sha256(value.tobytes() + str(value.shape).encode()).hexdigest()[:12]
        if isinstance(value, nn.Module):
            return digest(list(value.state_dict().values()))
        if isinstance(value, tiktoken.Encoding):
            return digest(repr(describe_tokenizer(value)))
        if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
            return digest(repr([digest(v) for v in value]))
        return hashlib.sha256(repr(value).encode()).hexdigest()[:12]

    names = """SETTINGS preset_name config train_config sample held_out tokenizer lengths
    shared train_tokens val_tokens starts x y baselines n_params model memorised at_once in_parts
    run_name measured result story maps info""".split()
    made = {name: digest(globals()[name]) for name in names if name in globals()}
    if globals().get("run"):
        made["run"] = digest([run.step, run.evaluations, [s[:3] for s in run.steps]])
        made["weights of the run"] = digest(run.model)
    gc.collect()
    if platform.libc_ver()[0] == "glibc":  # the notebook lets it keep what is free: not a leak
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    held = {
        "figures": len(plt.get_fignums()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "names": len([name for name in globals() if not name.startswith("_")]),
        "hooks": sum(len(m._forward_pre_hooks) for m in model.modules())
        if isinstance(globals().get("model"), nn.Module) else 0,
    }
    print(json.dumps({"made": made, "held": held, "memory": memory}))


_probe()
'''


@pytest.fixture(scope="module")
def run_again(tmp_path_factory):
    """(outputs, probes) of the notebook with each cell run twice, and of two more whole passes."""
    folder = tmp_path_factory.mktemp("again")
    book = nbformat.read(NOTEBOOK, as_version=4)
    sources = [cell.source for cell in book.cells if cell.cell_type == "code"]
    ready = next(i for i, source in enumerate(sources) if "import torch.nn as nn" in source)
    cells = []
    for i, source in enumerate(sources):
        for _ in range(2):
            cells += [source, PROBE] if i >= ready else [source]
    for _ in range(2):
        cells += [*sources, PROBE]
    book.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(book, folder / "again.ipynb")
    exact = SMALL["TRAINING"] | {"precision": "float32"}  # else the faster one is chosen each time
    command = [sys.executable, "-m", "jupyter", "execute", "again.ipynb", "--output=done.ipynb"]
    launch(command, folder, SMALL | {"DATASET": "practice", "TRAINING": exact})
    probes, outputs = [], []
    for cell in nbformat.read(folder / "done.ipynb", as_version=4).cells:
        text = "".join(output.get("text", "") for output in cell.outputs)
        if cell.source == PROBE:
            probes.append(json.loads(text.strip().splitlines()[-1]))
        else:
            outputs.append((cell.source, text))
    return len(sources) - ready, outputs, probes


@pytest.mark.slow
def test_each_cell_run_twice_makes_the_same_again(run_again):
    n, outputs, probes = run_again
    for i in range(n):
        first, second = probes[2 * i], probes[2 * i + 1]
        source = outputs[2 * (len(outputs) // 4 - n + i)][0][:200]
        assert first["made"] == second["made"], source
        assert first["held"]["names"] == second["held"]["names"], source
        assert first["held"]["figures"] == second["held"]["figures"] == 0, source
        assert first["held"]["hooks"] == second["held"]["hooks"] == 0, source


@pytest.mark.slow
def test_the_whole_notebook_again_finds_the_run_complete_and_holds_no_more(run_again):
    n, outputs, probes = run_again
    once, twice, thrice = probes[2 * n - 1 :]
    assert once["made"] == twice["made"] == thrice["made"]
    each = len(outputs) // 4
    for passed in (outputs[2 * each : 3 * each], outputs[3 * each :]):
        assert any("This run is complete:" in text for _, text in passed)
        assert any("train.bin: reusing" in text for _, text in passed)
    print([probe["memory"] for probe in (once, twice, thrice)])
    print([probe["held"] for probe in (once, twice, thrice)])
    assert thrice["memory"] < twice["memory"] + 50  # MiB
    for what in ("figures", "names", "hooks"):
        assert once["held"][what] == thrice["held"][what], what
    for what in ("files", "threads"):
        assert thrice["held"][what] <= twice["held"][what] + 2, what


# Checkpoints that were whole once.
@pytest.fixture(scope="module")
def stopped(nb, tmp_path_factory):
    """A run that stopped at step 10."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    twenty_steps(nb, folder, stop_at=10)
    return folder


def other_weights(stored):
    stored["model"]["transformer.wte.weight"] = torch.zeros(2, 2)


def another_optimizer(stored):
    stored["optimizer"].append({})


def an_earlier_format(stored):
    stored["identity"] = "the text's alone"


USED = ("model", "optimizer", "identity", "step", "max_steps", "budget", "eval_every")
USED += ("eval_tokens", "seconds", "steps", "evaluations")


@pytest.fixture
def refused(nb, stopped, tmp_path, monkeypatch):
    """`refused(change)`: resuming from a changed checkpoint ends in a sentence and touches nothing.

    Before the first step: with moments of another shape, the optimizer would read foreign memory.
    """

    def no_step(*_):
        raise AssertionError("training went on")

    monkeypatch.setattr(nb, "step_with_oom_retry", no_step)
    return partial(assert_refused, nb, stopped, tmp_path / "run")


def assert_refused(nb, stopped, folder, change):
    shutil.copytree(stopped, folder)
    stored = torch.load(folder / "last.pt", weights_only=True)
    change(stored)
    torch.save(stored, folder / "last.pt")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(nb.UserError) as caught:
        twenty_steps(nb, folder)
    assert "last.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("key", USED)
def test_a_checkpoint_without_a_field_is_refused(refused, key):
    refused(lambda stored: stored.pop(key))


@pytest.mark.parametrize("change", [other_weights, another_optimizer, an_earlier_format])
def test_a_checkpoint_that_does_not_fit_is_refused(refused, change):
    refused(change)


def test_a_bit_that_fell_over_in_a_checkpoint_is_noticed(nb, stopped, tmp_path):
    """Each of 200 flipped bits is refused, or does not matter: all values are what they were."""
    data, path = (stopped / "last.pt").read_bytes(), tmp_path / "last.pt"
    good, rng, refused = torch.load(stopped / "last.pt", weights_only=True), random.Random(3), 0
    for _ in range(200):
        altered = bytearray(data)
        altered[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        try:
            stored = nb.load_checkpoint(path)
        except nb.UserError:
            refused += 1
            continue
        assert same(dict(stored["model"]), dict(good["model"]))
        assert repr(stored["optimizer"]) == repr(good["optimizer"])
        assert stored["steps"] == good["steps"]
    assert refused > 100


# Token files that were whole once.
def test_a_byte_that_changed_anywhere_in_a_token_file_is_noticed(nb, tokenizer, stories, tmp_path):
    path, rng = tmp_path / "train.bin", np.random.default_rng(1)
    nb.write_tokens([stories], tokenizer, path, None, "text")
    data = path.read_bytes()
    for at in [0, len(data) - 1, *rng.integers(0, len(data), 50)]:
        altered = bytearray(data)
        altered[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(altered)
        assert nb.read_tokens(path, tokenizer, "text") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "5", '{"name": "bpe"}', '{"merges": 1}'])
def test_a_damaged_tokenizer_file_is_made_again(nb, stories, tmp_path, text):
    path = tmp_path / "tokenizer.json"
    first = nb.own_tokenizer(path, stories[:50], 300, "text")
    whole = path.read_bytes()
    path.write_text(text)
    assert nb.own_tokenizer(path, stories[:50], 300, "text").merges == first.merges
    assert path.read_bytes() == whole
