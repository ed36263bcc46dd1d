"""What README.md shows runs: every fenced block marked with the comment `<!-- run -->` on the line before.

The blocks run in reading order in one folder, so that a later one may use what an earlier one wrote. Paths below
`examples/` mean those of the repository; of the model there, the first layer.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"<!-- run -->[ \t]*\n+```(?P<language>\w+)\n(?P<code>.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block to run; `line` is where its code starts in the file."""

    language: str
    code: str
    line: int


def runnable_blocks(markdown: str) -> list[Block]:
    return [
        Block(match["language"], match["code"], markdown.count("\n", 0, match.start("code")) + 1)
        for match in BLOCK.finditer(markdown)
    ]


def command_for(block: Block) -> list[str]:
    """The command line that runs a block; in shell blocks `hf-lrq` and `python` are this interpreter's."""
    if block.language == "python":
        return [sys.executable, "-c", block.code]
    if block.language == "bash":
        functions = f'hf-lrq() {{ "{sys.executable}" -m hf_lrq.cli "$@"; }}\npython() {{ "{sys.executable}" "$@"; }}\n'
        return ["bash", "-euo", "pipefail", "-c", functions + block.code]
    raise ValueError(f"README.md:{block.line}: cannot run a block of {block.language!r}; mark python or bash")


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    # The package of this checkout, installed or not; one thread, since tests run side by side.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command_for(block), cwd=folder, env=env, capture_output=True, text=True, timeout=1200, check=False
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder beside a copy of the examples: a block that writes there changes nothing in the checkout."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    keep_one_layer(tmp_path / "examples" / "tiny_lm" / "model")
    return tmp_path


def keep_one_layer(model: Path) -> None:
    """Cut a model on disk to its first layer: every block does all that it does, in a fifth of the time."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if re.match(r"model\.layers\.[1-9]", name) is None}
    assert len(kept) < len(tensors)
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


def test_the_marked_blocks_of_the_readme_run(folder: Path) -> None:
    blocks = runnable_blocks(README.read_text(encoding="utf-8"))
    for block in blocks:
        result = run_block(block, folder)
        assert result.returncode == 0, (
            f"README.md:{block.line} exits with {result.returncode}\n{block.code}\n{result.stdout}\n{result.stderr}"
        )


def test_every_mark_is_followed_by_a_block() -> None:
    readme = README.read_text(encoding="utf-8")
    assert len(runnable_blocks(readme)) == readme.count("<!-- run -->")


SAMPLE = """\
Text, and `<!-- run -->` would not be a mark without a block.

<!-- run -->
```python
print("one")
```

```python
not run
```

<!-- run -->

```bash
echo two
```
"""


def test_only_marked_blocks_are_found() -> None:
    assert runnable_blocks(SAMPLE) == [Block("python", 'print("one")\n', 5), Block("bash", "echo two\n", 15)]


def test_blocks_run_in_the_folder(tmp_path: Path) -> None:
    write = Block("python", "open('a.txt', 'w').write('written')", 1)
    read = Block("bash", "python -c \"print(open('a.txt').read())\"", 1)
    assert run_block(write, tmp_path).returncode == 0
    assert run_block(read, tmp_path).stdout == "written\n"


@pytest.mark.parametrize(
    "block",
    [
        Block("python", "raise SystemExit(3)", 1),
        Block("bash", "exit 3", 1),
        Block("bash", "python -c 'exit(3)'\ntrue", 1),
    ],
)
def test_a_block_that_fails_is_seen(block: Block, tmp_path: Path) -> None:
    assert run_block(block, tmp_path).returncode == 3


def test_a_block_of_another_language_is_refused() -> None:
    with pytest.raises(ValueError, match=r"README\.md:7: cannot run a block of 'ruby'"):
        command_for(Block("ruby", "", 7))
