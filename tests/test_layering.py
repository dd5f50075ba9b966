"""The law of the house: imports point down, kernels see no torch, files stay short."""

import ast
import pathlib
import statistics

ROOT = pathlib.Path(__file__).parents[1]
BASE = {"cs336.utils", "cs336._load"}
OPS = BASE | {"cs336.ops", "cs336.tokenizer"}
NN = OPS | {"cs336.backend", "cs336.nn", "cs336.optim"}
MODELS = NN | {"cs336.models"}
DATA = MODELS | {"cs336.parallel", "cs336.data"}
TRAINING = DATA | {"cs336.training"}
INFERENCE = TRAINING | {"cs336.inference"}
EVALUATION = INFERENCE | {"cs336.verifiers", "cs336.evaluation"}
EXPERIMENTS = EVALUATION | {"cs336.experiments"}
TOP = EXPERIMENTS | {"cs336.compression", "cs336.scaling", "cs336.alignment", "cs336.report", "cs336.env"}

# folder or file -> what it may import from cs336 (a package may always import itself)
MAY_IMPORT = {
    "cs336/utils": set(),
    "cs336/_load.py": set(),
    "cs336/tokenizer": {"cs336._text", "cs336.utils"},
    "cs336/report": {"cs336.utils"},
    "cs336/ops/ref": set(),
    "cs336/ops/ref/sharded_adamw.py": {"cs336.ops.communicator", "cs336.ops.ref"},
    "cs336/ops/triton": set(),
    "cs336/ops/triton/sharded_adamw.py": {"cs336.ops.communicator", "cs336.ops.ref.sharded_adamw", "cs336.ops.triton"},
    "cs336/ops": BASE,
    "cs336/backend.py": BASE | {"cs336.ops"},
    "cs336/compile_backend.py": BASE | {"cs336.ops"},
    "cs336/flash_attn.py": BASE | {"cs336.ops"},
    "cs336/huggingface_attention.py": BASE | {"cs336.ops"},
    "cs336/env.py": OPS | {"cs336._text"},
    "cs336/nn": OPS,
    "cs336/optim": OPS,
    "cs336/models": NN,
    "cs336/parallel": MODELS,
    "cs336/data": MODELS | {"cs336._text"},
    "cs336/training": DATA,
    "cs336/inference": TRAINING,
    "cs336/verifiers": INFERENCE,
    "cs336/evaluation": INFERENCE | {"cs336.verifiers"},
    "cs336/compression": EVALUATION,
    "cs336/experiments": EVALUATION,
    "cs336/scaling": EXPERIMENTS,
    "cs336/alignment": EXPERIMENTS,
    "cs336/quickstart.py": TOP | {"cs336.data_demo", "cs336.quickstart_full"},
    "cs336/quickstart_full.py": TOP | {"cs336.align_demo"},
    "cs336/data_demo.py": TOP,
    "cs336/align_demo.py": TOP | {"cs336.align_ladder"},
    "cs336/align_ladder.py": TOP,
    "cs336/cli": TOP | {"cs336.quickstart", "cs336.data_demo", "cs336.align_demo", "cs336.align_ladder"},
    "cs336": {"cs336"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def within(name, package):
    return name == package or name.startswith(package + ".")


def test_imports_point_down():
    bad = []
    for path in (ROOT / "cs336").rglob("*.py"):
        rel = path.relative_to(ROOT).as_posix()
        rule = max((r for r in MAY_IMPORT if rel == r or rel.startswith(r + "/")), key=len)
        own = rule.removesuffix(".py").replace("/", ".")
        for name in imports(path):
            if within(name, "cs336") and name != "cs336.__version__":
                allowed = MAY_IMPORT[rule] | ({own} if rule != "cs336" else set())
                if not any(within(name, a) for a in allowed):
                    bad.append(f"{rel} imports {name}")
    assert not bad, "\n".join(bad)


def test_kernels_are_torch_free():
    folders = ("csrc/common", "csrc/kernels", "csrc/cpu")
    files = [p for d in folders for p in (ROOT / d).rglob("*") if p.is_file()]
    assert files
    bad = [p for p in files if any(s in p.read_text() for s in ("torch/", "ATen/", "c10/"))]
    assert not bad, bad


def test_torch_bindings_never_meet_nvcc():
    assert not list((ROOT / "csrc/ops").rglob("*.cu"))


def test_file_lengths():
    limit = {".py": 600, ".cpp": 600, ".h": 600, ".cuh": 600, ".cu": 1000}
    lengths = {
        p: len(p.read_text().splitlines())
        for d in ("cs336", "csrc", "tests", "benchmarks", "profiling")
        for p in (ROOT / d).rglob("*")
        if p.suffix in limit
    }
    assert not {str(p): n for p, n in lengths.items() if n > limit[p.suffix]}
    assert statistics.median(lengths.values()) < 250
