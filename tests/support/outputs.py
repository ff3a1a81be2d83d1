"""What a checkout of the program puts out, to be held against what another one does.

    python tests/support/outputs.py make FOLDER [--checkout DIR] [--only PART ...]
    python tests/support/outputs.py compare A B [--only PART ...]

`make` runs the program by its command line alone, on the CPU with one thread, and writes what it
prints and leaves in files to FOLDER in a form that can be compared: paths are named instead of
written, tensors become their type, shape, checksum and first values. `compare` prints every
difference between two such folders, and exits with 1 if there is one. It knows nothing of the
program's modules, so that the two checkouts may be laid out in different ways.

Real data are used where LOWMEM_CFT_DATA names them; both folders have to be made with the same.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

IGNORED_FIELDS = (
    "seconds",  # time: of a stage, of the demo, of a run so far
    "train_seconds",  # time
    "rows_per_s",  # time
    "tokens_per_s",  # time
    "step_ms",  # time
    "began",  # time: when a reproduction began
    "finished",  # time: when a stage ended
    "versions",  # versions of Python, of the libraries, of this package
    "transformers_version",  # version, in a model's configuration
    "peft_version",  # version, in an adapter's configuration
)
"""Keys of JSON objects that are passed over with all that is under them, wherever they stand."""

MEASURED_MEMORY = (
    "demo/",  # the demo's line and metrics
    "tiny/",  # log lines, metrics and stages of the tiny runs
)
"""Where `peak_bytes` is measured; in a plan it is predicted, and compared."""

IGNORED_TEXT = (
    r"(?<=<checkout>/)[\w./-]+/(?=[\w.-])",  # path: where in a checkout a file of the package lies
    r"(?<= )[\d.,]+(?= rows/s)",  # time: a line of progress
    r"(?<= )[\d.,]+(?= rows per second)",  # time: the model card
    r"^[\d.,]+(?= s on CPU)",  # time: the model card
    r"(?<=peak memory )[\d.,]+(?= GiB)",  # memory: the model card
    r"(?<=GiB\. )python \d.*$",  # versions: the model card
    r"(?<= of )[\d.]+(?= GiB, [\d.]+ times the cost)",  # memory: free on this machine now
    r"^\| dates \|.*$",  # time: a reproduction's report
    r"^\| time in stages \|.*$",  # time: a reproduction's report
    r"^\| versions \|.*$",  # versions: a reproduction's report
    r"(?<=\.\d{4} \| )[\d.,]+ \| [\d.,]+ \| [\d.]+ \|$",  # time, memory: a training run's row in it
    r"(?<= \| )[\d.,]+(?= \| [\d.,-]+ \| \d{4}-\d\d-\d\d )",  # time: a stage's row in it
    r"(?<= \| )\d{4}-\d\d-\d\d \d\d:\d\d(?= \| )",  # time: a stage's row in it
    r"^In all [\d.,]+ \w+\.$",  # time: the sum of its stages
)
"""What is cut out of every line of text before two are compared."""

IGNORED_LINES = (
    r"[\d?](it/s|s/it)\]\s*$",  # time: a library's bar of progress
    r"^fetching .* once\)$",  # cache: the small model is fetched where it is not yet
    r"^converting .* \(once\)$",  # cache: and made a checkpoint
    r"^\d+ distinct texts, (tokenised once|read from the cache)$",  # cache
    r"^\s*$",  # around bars of progress
)
"""Lines of text that are passed over. Plans and the demo are made with the user's cache, where the
small model lies."""

Part = Callable[["Program"], None]


# --- running ----------------------------------------------------------------------------------


class Program:
    """The program of a checkout, run in a folder of its own; its outputs are kept under `out`."""

    def __init__(self, checkout: Path, work: Path, out: Path, demo_steps: int | None) -> None:
        self.checkout, self.work, self.out = checkout, work, out
        self.demo_steps = demo_steps
        self.seconds: dict[str, float] = {}
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (checkout, checkout / "kernels"))),
            "PYTHONSAFEPATH": "1",  # the working folder holds no modules
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",  # peft and sentence-transformers write sets in their order
            "COLUMNS": "200",  # a longer number must not break a line elsewhere
            "NO_COLOR": "1",
        }
        self._check_where_it_is_imported_from()

    def _check_where_it_is_imported_from(self) -> None:
        code = "import lowmem_cft, lowmem_cft_kernels as k; print(lowmem_cft.__file__); print(k.__file__)"
        done = self._python(code)
        places = [Path(line) for line in done.stdout.splitlines()]
        if done.returncode or any(self.checkout not in place.parents for place in places):
            raise SystemExit(f"{self.checkout}: not what is imported: {done.stdout}{done.stderr}")

    def _python(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=self.work,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def __call__(self, name: str, *arguments: str, may_fail: bool = False) -> str:
        """Run a command, keep what it said under a name, give its standard output."""
        started = time.perf_counter()
        done = self._python(start_code(self.checkout), *arguments)
        self.seconds[name] = round(time.perf_counter() - started, 1)
        print(f"{self.seconds[name]:7.1f} s  {name}", flush=True)
        if done.returncode and not may_fail:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        said = [
            f"$ lowmem-cft {' '.join(arguments)}",
            f"exit code {done.returncode}",
            *("--- standard output", done.stdout),
            *("--- standard error", done.stderr),
        ]
        self.keep_text(f"{name}.txt", "\n".join(said))
        return done.stdout

    # -- keeping ----------------------------------------------------------------------------

    def normal(self, text: str) -> str:
        """The text with names in place of paths."""
        cache = self.environment.get("LOWMEM_CFT_CACHE") or Path.home() / ".cache" / "lowmem-cft"
        named = {Path(cache): "<cache>"}
        named |= {self.work.resolve(): "<work>", self.work: "<work>", self.checkout: "<checkout>"}
        if data := os.environ.get("LOWMEM_CFT_DATA"):
            named[Path(data)] = "<data>"
        for path, name in named.items():
            text = text.replace(str(path), name)
        return text

    def keep_text(self, name: str, text: str) -> None:
        target = self.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.normal(text), encoding="utf-8")

    def keep_json(self, name: str, values: Any) -> None:
        self.keep_text(name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")

    def keep(self, name: str, path: Path) -> None:
        """Keep a file, or every file of a folder, in the normal form."""
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file():
                    self.keep(f"{name}/{file.relative_to(path)}", file)
            return
        read = _READERS.get(path.suffix)
        if read is not None:
            self.keep_json(f"{name}.json", read(path))
        elif b"\0" in (data := path.read_bytes()):
            self.keep_json(f"{name}.json", {"sha256": hashlib.sha256(data).hexdigest()})
        else:
            self.keep_text(name, data.decode("utf-8"))


def start_code(checkout: Path) -> str:
    """Python that starts the program as its console script does, wherever that leads."""
    text = (checkout / "pyproject.toml").read_text(encoding="utf-8")  # Python 3.10 has no tomllib
    found = re.search(r'^lowmem-cft\s*=\s*"([\w.]+):(\w+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{checkout / 'pyproject.toml'}: names no console script lowmem-cft")
    return f"import sys; sys.argv[0] = 'lowmem-cft'; from {found[1]} import {found[2]} as m; m()"


# --- the normal form of tensors -----------------------------------------------------------------


def _described(tensor: Any) -> Any:
    """A tensor or array as JSON; other values as they are."""
    import numpy as np
    import torch

    if isinstance(tensor, dict):
        return {str(key): _described(value) for key, value in tensor.items()}
    if isinstance(tensor, (list, tuple)):
        return [_described(value) for value in tensor]
    if isinstance(tensor, torch.Tensor):
        flat = tensor.detach().contiguous().flatten()
        data, first = flat.view(torch.uint8).numpy().tobytes(), flat[:8].tolist()
        dtype = str(tensor.dtype).removeprefix("torch.")
    elif isinstance(tensor, np.ndarray):
        data, first, dtype = tensor.tobytes(), tensor.flatten()[:8].tolist(), str(tensor.dtype)
    else:
        return tensor
    shape, sha256 = list(tensor.shape), hashlib.sha256(data).hexdigest()
    return {"dtype": dtype, "shape": shape, "sha256": sha256, "first": first}


def _safetensors(path: Path) -> Any:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        return {"metadata": file.metadata(), "tensors": _described(tensors)}


def _torch(path: Path) -> Any:
    import torch

    return _described(torch.load(path, map_location="cpu", weights_only=True))


def _numpy(path: Path) -> Any:
    import numpy as np

    found = np.load(path)
    return _described(dict(found) if path.suffix == ".npz" else found)


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return {"schema": str(table.schema), "columns": table.to_pydict()}


_READERS = {
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".npy": _numpy,
    ".npz": _numpy,
    ".parquet": _parquet,
}


# --- what is run --------------------------------------------------------------------------------


def _presets(program: Program) -> list[str]:
    return [line.split()[0] for line in program("recipes/names", "recipes").splitlines()]


def make_recipes(program: Program) -> None:
    """The names of the presets; the quickest part."""
    _presets(program)


def make_commands(program: Program) -> None:
    """Every command's help, every preset as it is resolved, mistakes."""
    program("commands/help", "--help")
    listed = (program.out / "commands" / "help.txt").read_text(encoding="utf-8")
    for name in re.findall(r"^│ ([a-z][a-z-]+) ", listed, re.MULTILINE):
        program(f"commands/help-{name}", name, "--help")
    for name in _presets(program):
        program(f"commands/config-{name}", "train", name, "--print-config")
    mistakes = {
        "key": ["train", "demo", "--set", "train.stepz=3", "--print-config"],
        "preset": ["train", "dmo"],
        "model": ["eval", "no-such-model", "-s", "demo", "--offline"],
        "set": ["eval", "tiny", "-s", "no-such-set"],
        "compare": ["compare", "here", "there"],
        "paper": ["reproduce", "simcse", "--model", "opt-125m"],
    }
    for name, arguments in mistakes.items():
        program(f"commands/mistake-{name}", *arguments, may_fail=True)


def make_plans(program: Program) -> None:
    """The plan of every preset; of those that do not fit, what is said."""
    for name in _presets(program):
        arguments = ["plan", name, "--memory", "12GiB", "--json"]
        out = program(f"plans/{name}", *arguments, may_fail=True)
        if out:
            program.keep_json(f"plans/{name}.json", json.loads(out))


def make_demo(program: Program) -> None:
    """The demo's last line, and what the run left."""
    steps = program.demo_steps
    cut = [] if steps is None else ["--set", f"train.steps={steps}"]
    out = program("demo/said", "demo", "--offline", *cut)
    line = json.loads(out.splitlines()[-1])
    table, _, _ = (program.out / "demo" / "said.txt").read_text("utf-8").rpartition('{"before"')
    rest = (program.out / "demo" / "said.txt").read_text("utf-8").partition("--- standard error")
    program.keep_text("demo/said.txt", f"{table}\n{''.join(rest[1:])}")
    program.keep_json("demo/line.json", line)
    program.keep("demo/run", program.work / "runs" / "demo")


def make_tiny(program: Program) -> None:
    """A tiny model trained, evaluated, exported, searched, taken through a paper's stages."""
    cache = program.work / "cache"
    environment = program.environment
    program.environment = {**environment, "LOWMEM_CFT_CACHE": str(cache)}
    save_tiny_model(program.work / "tiny")
    write_tiny_data(program.work)
    run = "runs/tiny"
    program("tiny/train", "train", "tiny.yaml", "--offline")
    program("tiny/train-again", "train", "tiny.yaml", "--offline", may_fail=True)
    program("tiny/resume", "train", "tiny.yaml", "--offline", "--resume")
    program("tiny/eval-run", "eval", run, "-s", "pairs.tsv", "-s", "demo", "--offline")
    program("tiny/eval-base", "eval", "tiny", "--recipe", "tiny.yaml", *_sets("base.json"))
    program("tiny/eval-float32", "eval", f"{run}/model", "--float32", *_sets("float32.json"))
    program("tiny/eval-out", "eval", run, *_sets("run.json"))
    program("tiny/compare", "compare", "base.json", "run.json", "--out", "compared.json")
    program("tiny/export", "export", run, "--merged", "--out", "merged")
    program("tiny/embed", "embed", run, "texts.txt")
    program("tiny/embed-merged", "embed", "merged", "texts.txt", "--out", "merged.parquet")
    search = ["icl-search", "tiny", "-s", "pairs.tsv", "--demonstrations", "shown.tsv"]
    program("tiny/search", *search, "--out", "icl")
    program("tiny/search-again", *search, "--out", "icl")
    program("tiny/plan", "plan", "tiny.yaml", "--device", "cpu")
    if "LOWMEM_CFT_DATA" in program.environment:
        _evaluate_on_real_data(program, run)
        _reproduce(program)
    for entry in sorted(program.work.iterdir()):
        if entry.name != "runs":
            program.keep(f"tiny/work/{entry.name}", entry)
    program.keep("tiny/run", program.work / run)
    program.environment = environment


def _sets(out: str) -> list[str]:
    return ["-s", "pairs.tsv", "-s", "demo", "--offline", "--out", out]


def _evaluate_on_real_data(program: Program, run: str) -> None:
    program("tiny/sts", "eval", run, "--suite", "sts", "--offline")
    some = ["--protocol", "mteb", "-s", "STS17", "-s", "STS13", "--mteb-out", "mteb"]
    program("tiny/sts-some", "eval", run, *some, "--offline")
    senteval = ["--suite", "sts", "--protocol", "senteval", "--clean-up", "--resamples", "100"]
    program("tiny/sts-senteval", "eval", run, *senteval, "--offline")
    transfer = ["--suite", "transfer", "-s", "MRPC", "-s", "SST2", "--limit", "200", "--offline"]
    program("tiny/transfer", "eval", run, *transfer)
    program("tiny/transfer-converged", "eval", run, *transfer, "--solver", "converged")


def _reproduce(program: Program) -> None:
    asked = [
        *("reproduce", "cft", "--model", "smollm2-135m", "--out", "paper", "--offline"),
        *("--transfer-rows", "1000", "--icl-pairs", "40", "--demonstrations", "shown.tsv"),
    ]
    for value in (
        *("model.id=tiny", "model.quantization=none", "model.dtype=fp32", "memory.limit=6GiB"),
        *("data.sources=[{path: demo}]", "train.steps=6", "train.logical_batch=16"),
        *("train.learning_rate=5e-3", "memory.token_budget=512"),
    ):
        asked += ["--set", value]
    stages = ("data", "base", "train", "evaluate", "icl-search", "transfer-trained")
    for name in stages:
        asked += ["--stage", name]
    program("tiny/paper", *asked)
    program("tiny/paper-again", *asked)


PARTS: dict[str, Part] = {
    "recipes": make_recipes,
    "commands": make_commands,
    "plans": make_plans,
    "tiny": make_tiny,
    "demo": make_demo,
}


# --- a tiny model and its data --------------------------------------------------------------------


def save_tiny_model(folder: Path, hidden: int = 32, layers: int = 3) -> None:
    """A Llama of random weights whose tokens are bytes: any text has its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), special, strict=True)),
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_RECIPE = """\
model: {id: tiny, quantization: none, dtype: fp32}
lora: {rank: 4, alpha: 8, dropout: 0.1}
text: {template: "say: {text}", document_template: "{text}", max_tokens: 48}
data:
  sources:
    - path: demo
    - {path: rows.jsonl, weight: 0.5}
loss: {learn_temperature: true, softmaxes: symmetric}
train: {logical_batch: 32, steps: 60, learning_rate: 3e-3, warmup_steps: 6, save_every: 30}
memory: {limit: 6GiB, token_budget: 512, keep_graphs: "off"}
eval: {sets: [demo, pairs.tsv], every: 20, keep_best: true}
"""

_SUBJECTS = ("A cat", "The dog", "My sister", "An old man", "Nobody", "The train")
_VERBS = ("sees", "leaves", "forgets", "paints", "carries")
_OBJECTS = ("the house.", "a red boat.", "two letters.", "the river.", "her bread.")


def write_tiny_data(folder: Path) -> None:
    """A recipe, rows, scored pairs, texts and demonstrations, the same each time."""
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(words) for words in (_SUBJECTS, _VERBS, _OBJECTS))

    keys = ("anchor", "positive", "negative")
    rows = [json.dumps({key: sentence() for key in keys}) for _ in range(60)]
    pairs = [f"{sentence()}\t{sentence()}\t{draw.uniform(0, 5):.2f}" for _ in range(80)]
    shown = [f"{sentence()}\t{word}" for word in ("animal", "home", "road")]
    files = {
        "tiny.yaml": [_RECIPE.rstrip()],
        "rows.jsonl": rows,
        "pairs.tsv": ["sentence1\tsentence2\tscore", *pairs],
        "shown.tsv": ["sentence\tword", *shown],
        "texts.txt": [sentence() for _ in range(12)],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def make(folder: Path, checkout: Path, only: Sequence[str], demo_steps: int | None) -> None:
    """Write the outputs of a checkout; of the parts asked for, those there before are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="outputs-") as work:
        program = Program(checkout, Path(work), folder, demo_steps)
        for name in only or PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
            PARTS[name](program)


# --- comparing ----------------------------------------------------------------------------------


def _flat(value: Any, path: str = "", *, ignored: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The single values of JSON with where they stand, less those ignored."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            if key not in ignored:
                yield from _flat(inner, f"{path}/{key}", ignored=ignored)
    elif isinstance(value, list) and value:
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{path}/{i}", ignored=ignored)
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _values(name: str, text: str) -> dict[str, str]:
    ignored = list(IGNORED_FIELDS)
    if name.startswith(MEASURED_MEMORY):
        ignored.append("peak_bytes")
    lines = text.splitlines() if name.endswith(".jsonl") else [text]
    return {
        f"line {i}{path}" if len(lines) > 1 else path: value
        for i, line in enumerate(lines, 1)
        for path, value in _flat(json.loads(line), ignored=ignored)
    }


def _compare_json(name: str, text_a: str, text_b: str) -> list[str]:
    a, b = _values(name, text_a), _values(name, text_b)
    found = [
        f"{name}: {path}: {a.get(path, 'nothing')} -> {b.get(path, 'nothing')}"
        for path in {**a, **b}
        if a.get(path) != b.get(path)
    ]
    if not found and list(a) != list(b):
        found.append(f"{name}: the same values in another order")
    return found


def _lines(text: str) -> list[str]:
    for pattern in IGNORED_TEXT:
        text = re.sub(pattern, "...", text, flags=re.MULTILINE)
    dropped = re.compile("|".join(IGNORED_LINES))
    return [line for line in text.splitlines() if not dropped.search(line)]


def _compare_text(name: str, text_a: str, text_b: str) -> list[str]:
    changed = difflib.unified_diff(_lines(text_a), _lines(text_b), n=0, lineterm="")
    return [f"{name}: {line}" for line in changed if not line.startswith(("---", "+++", "@@"))]


def compare(a: Path, b: Path, only: Sequence[str] = ()) -> list[str]:
    """Every difference of two folders of outputs, a line each."""

    def files(folder: Path) -> set[str]:
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        return {name for name in names if not only or name.split("/")[0].split(".")[0] in only}

    of_a, of_b = files(a), files(b)
    found = [f"{name}: only in {a}" for name in sorted(of_a - of_b)]
    found += [f"{name}: only in {b}" for name in sorted(of_b - of_a)]
    for name in sorted(of_a & of_b):
        text_a, text_b = ((folder / name).read_text(encoding="utf-8") for folder in (a, b))
        is_json = name.endswith((".json", ".jsonl"))
        found += (_compare_json if is_json else _compare_text)(name, text_a, text_b)
    if not of_a & of_b:
        found.append(f"{a} and {b} have no file in common")
    else:
        print(f"files compared: {len(of_a & of_b)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="run a checkout's program and keep its outputs")
    maker.add_argument("folder", type=Path)
    maker.add_argument("--checkout", type=Path, default=ROOT, help="this one if absent")
    maker.add_argument("--demo-steps", type=int, help="a shorter demo, for trying things")
    comparer = commands.add_parser("compare", help="print every difference of two such folders")
    comparer.add_argument("a", type=Path)
    comparer.add_argument("b", type=Path)
    for each in (maker, comparer):
        each.add_argument("--only", choices=PARTS, nargs="+", default=[], help="parts, not all")
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder.resolve(), given.checkout.resolve(), given.only, given.demo_steps)
        return
    found = compare(given.a, given.b, given.only)
    print("\n".join(found) if found else "no difference")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
