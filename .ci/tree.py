"""Write the README's file tree from the first line of each module's docstring, or check it.

python .ci/tree.py [--check]
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- tree: begin -->", "<!-- tree: end -->"
ORDER = (
    "cli.py", "cli_train.py", "cli_env.py", "rl", "quantize", "serve", "eval", "train", "engine",
    "data", "envs", "plan", "checkpoint", "model", "ops", "text", "parallel", "base",
)  # fmt: skip


def phrase(file: Path) -> str:
    """Return the first line of a module's docstring, without the full stop."""
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert docstring, f"{file} has no docstring"
    return docstring.splitlines()[0].rstrip(".")


def tree() -> str:
    """Draw the package, top layer first."""
    lines = ["aprium/"]
    for name in ORDER:
        path = ROOT / "aprium" / name
        if path.is_file():
            lines.append(f"  {name:<24}{phrase(path)}")
        elif path.is_dir():
            lines.append(f"  {name}/")
            for file in sorted(path.rglob("*.py")):
                if file.name != "__init__.py":
                    lines.append(f"    {file.relative_to(path)!s:<22}{phrase(file)}")
    return "\n".join(lines)


def main() -> int:
    """Rewrite the README between its markers; with --check, only tell whether it is current."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    new = f"{head}{BEGIN}\n```\n{tree()}\n```\n{END}{tail}"
    if "--check" in sys.argv:
        if new != text:
            print("the README's file tree is stale: run python .ci/tree.py")
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
