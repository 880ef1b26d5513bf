"""How the code is laid out: who imports whom, how large files and functions are, public names, the README's tree."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "inverseq"
KERNELS = ROOT / "kernels" / "inverseq_kernels"
# What every stage may import, apart from the kernels.
FOUNDATION = {"records", "config", "attention", "model", "packing", "atomic", "distributed"}
FOUNDATION |= {"attention_layout", "attention_sdpa", "attention_varlen", "attention_flex"}
FOUNDATION |= {"architecture", "fused_layers", "lora", "transfers", "zero_loading", "zero_options"}
# Only these know the order of the stages, or read the configuration for all of them.
COMPOSING = {"trainer", "cli", "dry_run", "resolve", "run_directory", "config_loading", "placement"}
COMPOSING |= {"run_state", "overlap", "__init__", "__main__"}
# One stage in several files.
STAGES_OF_SEVERAL_FILES = [
    {"sampling", "sampling_transformers", "sampling_replay", "sampling_ahead", "sample_files", "freshness"}
    | {"sampling_attention", "sampling_cache", "sampling_noise", "sampling_lmdeploy", "sampling_lmdeploy_pipeline"}
    | {"sampling_lmdeploy_server", "sampling_lmdeploy_client", "sampling_lmdeploy_weights", "sampling_lmdeploy_guard"}
    | {"sampling_server", "sampling_server_client", "sampling_server_protocol", "sampling_server_weights"},
    {"metrics", "progress"},
    {"policy", "engine", "engine_deepspeed"},
    {"checkpoint", "checkpoint_files", "checkpoint_sharded"},
    {"memory", "memory_records", "memory_zero"},
]
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 400, 60, 8
DICTATED_PARAMETERS = {"packed_attention"}  # transformers calls it
OPERATIONS = {"contrastive_logprob", "contrastive_logprob_sweep", "linear_logprob", "squared_log_ratio_loss"}


def source_files(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def absolute_imports(path, tree):
    """Dotted names of all modules that a file imports, at any depth; relative ones made absolute."""
    package = ["inverseq" if PACKAGE in path.parents else "inverseq_kernels"]
    package += path.relative_to(PACKAGE if PACKAGE in path.parents else KERNELS).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def modules_of(package_name, imported, known):
    """Names below ``package_name`` among imported dotted names that are modules of it."""
    parts = (name.split(".") for name in imported)
    return {name[1] for name in parts if name[0] == package_name and len(name) > 1 and name[1] in known}


def allowed_for(stage):
    families = [family for family in STAGES_OF_SEVERAL_FILES if stage in family]
    return FOUNDATION | {stage, "integrations"} | set().union(*families)


def layering_breaches(folder):
    """``file imports module`` for each import of another stage by a stage."""
    known = {path.stem for path in folder.glob("*.py")} | {path.name for path in folder.iterdir() if path.is_dir()}
    breaches = []
    for path in sorted(folder.glob("*.py")):
        if path.stem in COMPOSING:
            continue
        imported = modules_of("inverseq", absolute_imports(PACKAGE / path.name, parse(path)), known)
        breaches += [f"{path.stem} imports {name}" for name in sorted(imported - allowed_for(path.stem) - {"__init__"})]
    return breaches


def test_a_stage_imports_the_foundation_and_never_another_stage():
    assert layering_breaches(PACKAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        "from .targets import score_targets",
        "from . import targets",
        "import inverseq.targets",
        "from inverseq.targets import score_targets",
        "def late():\n    from .targets import score_targets",
    ],
)
def test_the_layering_test_sees_every_way_to_import_a_stage(tmp_path, line):
    (tmp_path / "targets.py").write_text("")
    (tmp_path / "steps.py").write_text(f"from .records import Sample\nimport numpy\n{line}\n")
    assert layering_breaches(tmp_path) == ["steps imports targets"]


def test_the_foundation_imports_no_stage():
    known = {path.stem for path in PACKAGE.glob("*.py")}
    for name in FOUNDATION:
        path = PACKAGE / f"{name}.py"
        assert modules_of("inverseq", absolute_imports(path, parse(path)), known) <= FOUNDATION, name


def test_the_kernels_import_torch_triton_and_the_standard_library_only():
    allowed = {"torch", "triton", "inverseq_kernels", *sys.stdlib_module_names}
    for path in source_files(KERNELS):
        foreign = {name.split(".")[0] for name in absolute_imports(path, parse(path)) if name} - allowed
        assert not foreign, f"{path}: {foreign}"


def test_adapters_for_other_code_import_the_kernels_only():
    for path in source_files(PACKAGE / "integrations"):
        names = {name for name in absolute_imports(path, parse(path)) if name.split(".")[0] == "inverseq"}
        assert all(name.startswith("inverseq.integrations") for name in names), f"{path}: {names}"


def test_of_the_adapters_the_project_reads_the_tested_versions_only():
    for path in source_files(PACKAGE):
        names = {name for name in absolute_imports(path, parse(path)) if name.startswith("inverseq.integrations")}
        allowed = path.parent.name == "integrations"
        assert allowed or all(name.startswith("inverseq.integrations.versions") for name in names), f"{path}: {names}"


CODE = [path for folder in ("inverseq", "kernels", "tests", "benchmarks") for path in source_files(ROOT / folder)]
CODE += [ROOT / "setup.py", *(path for path in ROOT.glob("csrc/*.[ch]pp"))]


def num_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_files_stay_under_400_lines():
    long = {str(p.relative_to(ROOT)): n for p in CODE if (n := num_lines(p)) >= MAX_FILE_LINES}
    assert not long


def functions():
    for path in CODE:
        if path.suffix == ".py":
            for node in ast.walk(parse(path)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node


def test_functions_stay_under_60_lines():
    """A Triton kernel's signature, which names each pointer, stride and block size on its own line, is not counted."""
    long = {}
    for where, node in functions():
        is_kernel = any("triton" in ast.unparse(decorator) for decorator in node.decorator_list)
        long[where] = node.end_lineno - (node.body[0].lineno if is_kernel else node.lineno) + 1
    assert not {where: lines for where, lines in long.items() if lines >= MAX_FUNCTION_LINES}


def test_functions_take_at_most_eight_parameters():
    """The fused operations and what stands behind them, all of it in the kernels, are the exception."""
    counts = {}
    for where, node in functions():
        arguments = node.args
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        if where.startswith("inverseq/") and node.name not in DICTATED_PARAMETERS:
            counts[where] = len([name for name in names if name not in ("self", "cls")])
    assert not {where: count for where, count in counts.items() if count > MAX_PARAMETERS}


def test_no_folder_is_a_grab_bag_and_kernels_is_no_package():
    assert not [path for path in CODE if path.stem in ("utils", "util", "helpers", "misc", "common")]
    assert not (ROOT / "kernels" / "__init__.py").exists()  # transformers would take it for another package


@pytest.mark.parametrize("path", [*source_files(PACKAGE), KERNELS / "__init__.py"], ids=lambda path: path.stem)
def test_public_names_are_listed_once_and_exist(path):
    tree = parse(path)
    [names] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", None) == "__all__" for target in node.targets)
    ]
    assert len(set(names)) == len(names)
    assert ast.get_docstring(tree), f"{path}: no docstring"
    root = PACKAGE.parent if PACKAGE in path.parents else KERNELS.parent
    dotted = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(dotted)
    assert [name for name in names if not hasattr(module, name)] == []


def test_public_docstrings_name_the_errors_that_their_functions_raise():
    silent = []
    for path in (*source_files(PACKAGE), *source_files(KERNELS)):
        tree = parse(path)
        assigned = {ast.unparse(each.targets[0]): each.value for each in tree.body if isinstance(each, ast.Assign)}
        public = ast.literal_eval(assigned["__all__"]) if "__all__" in assigned else ()
        for node in (each for each in tree.body if isinstance(each, ast.FunctionDef) and each.name in public):
            raised = [each.exc for each in ast.walk(node) if isinstance(each, ast.Raise)]
            names = {ast.unparse(error.func) for error in raised if isinstance(error, ast.Call)}
            described = ast.get_docstring(node) or ""
            silent += [f"{path.name}: {node.name}: {name}" for name in names if name not in described]
    assert not silent


def test_the_packages_public_names():
    import inverseq_kernels

    import inverseq

    assert inverseq.__all__ == ["Config", "__version__", "load_config", "train"]
    assert set(inverseq_kernels.__all__) >= OPERATIONS | {"IGNORE_INDEX"}
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        inverseq.tarin  # noqa: B018


def test_importing_the_package_loads_no_optional_dependency():
    optional = ("trl", "peft", "deepspeed", "lmdeploy", "wandb", "openai", "matplotlib")
    code = f"import sys, inverseq; print([name for name in {optional} if name in sys.modules])"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "[]"


def tree_block(text):
    """Paths of the first fenced block under the heading "File tree".

    A line holds one name, or several separated by single spaces, and behind two spaces words about them. Names of
    folders end with a slash; what is in a folder stands below it, indented.
    """
    section = re.split(r"^#+ +File tree *$", text, flags=re.MULTILINE | re.IGNORECASE)
    assert len(section) == 2, "README.md has one heading “File tree”"
    block = re.search(r"^```[a-z]*\n(.*?)^```", section[1], flags=re.MULTILINE | re.DOTALL)[1]
    folders, paths = [], []
    for line in block.splitlines():
        entry = re.match(r"( *)(\S+(?: \S+)*?)(?:  .*)?$", line)
        if not entry or not line.strip():
            continue
        indent = len(entry[1])
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        names = entry[2].split()
        paths += [parent + name for name in names]
        if len(names) == 1 and names[0].endswith("/"):
            folders.append((indent, parent + names[0]))
    return paths


def tree_mismatches(paths, tracked):
    """What the tree names that is not tracked, and what is tracked that the tree does not name.

    A folder with entries below it in the tree lists all its files; one without stands for all of them. ``*`` matches
    any part of a name.
    """

    def covers(entry, file):
        pattern = re.escape(entry).replace(r"\*", "[^/]*")
        whole = entry.endswith("/") and not any(other != entry and other.startswith(entry) for other in paths)
        return re.match(pattern if whole else pattern + r"\Z", file) is not None

    unknown = [
        entry
        for entry in paths
        if not any(covers(entry, file) or (entry.endswith("/") and file.startswith(entry)) for file in tracked)
    ]
    missing = [file for file in tracked if not any(covers(entry, file) for entry in paths)]
    return unknown, missing


def test_the_readmes_file_tree_is_the_files_there_are():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    if not (ROOT / "README.md").exists():
        pytest.skip("there is no README.md")
    tracked = [file for file in listed.stdout.splitlines() if not file.startswith(".git")]
    unknown, missing = tree_mismatches(tree_block((ROOT / "README.md").read_text("utf-8")), tracked)
    assert not unknown and not missing


def test_a_tree_that_is_out_of_date_is_noticed():
    text = (
        "# X\n\n## File tree\n\n```\npkg/       the package\n  a.py b.py   two files\n  data/   many\nREADME.md\n```\n"
    )
    paths = tree_block(text)
    assert paths == ["pkg/", "pkg/a.py", "pkg/b.py", "pkg/data/", "README.md"]
    tracked = ["pkg/a.py", "pkg/b.py", "pkg/data/x/1.txt", "README.md"]
    assert tree_mismatches(paths, tracked) == ([], [])
    assert tree_mismatches(paths, [*tracked, "pkg/c.py", "new.py"]) == ([], ["pkg/c.py", "new.py"])
    assert tree_mismatches(paths, tracked[1:]) == (["pkg/a.py"], [])
    assert tree_mismatches([*paths, "pkg/*.txt"], [*tracked, "pkg/n.txt"]) == ([], [])
    assert tree_mismatches(["pkg/", "pkg/data/", "README.md"], tracked) == ([], ["pkg/a.py", "pkg/b.py"])
