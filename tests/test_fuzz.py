"""Bad input, at scale: whatever comes in, a call gives a right result or refuses with an error of ours, and soon.

A normal run makes a few hundred draws, always the same; ``pytest tests/test_fuzz.py --draws 5000`` makes thousands
and prints the counts.  A fault is told with a call that can be pasted after ``from fuzzing.things import *`` and
``from fuzzing.documents import *``.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import pytest
from fuzzing import documents, surface, things, values
from fuzzing.judge import COLUMNS, HEAD, Case, Tally, judged
from fuzzing.tampering import ODD_JSON, byte_changes, document_changes
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

CALLEES = surface.callees()
NAMES: dict[str, Any] = {**vars(things), **vars(documents)}
NAMES["llvlit"] = things.llvlit
for _name in surface.public():
    import_module(_name.rpartition(".")[0])


@pytest.fixture(scope="module", autouse=True)
def workplace(request: pytest.FixtureRequest) -> Iterator[list[Tally]]:
    """Where calls write, removed at the end; the counts are printed where draws were asked for."""
    tallies: list[Tally] = []
    yield tallies
    terminal = request.config.pluginmanager.get_plugin("terminalreporter")
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if terminal is not None and request.config.getoption("--draws"):
        with capture.global_and_fixture_disabled():
            terminal.write_line("\n" + "\n".join([HEAD, *(tally.row() for tally in tallies)]))
    shutil.rmtree(things.WORK, ignore_errors=True)


def fuzz(
    kind: str, cases: st.SearchStrategy[Case], usual: int, request: pytest.FixtureRequest, share: float = 1
) -> None:
    """Judge as many draws as asked for; no foreign traceback, no hang, no wrong result."""
    tally = Tally(kind)
    asked = request.config.getoption("--draws")

    @seed(zlib.crc32(kind.encode()))
    @settings(
        max_examples=max(1, round(asked * share)) if asked else usual,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def draw(case: Case) -> None:
        tally.add(case, NAMES)
        if tally.draws % 50 == 0:
            things.cleared()

    draw()
    request.getfixturevalue("workplace").append(tally)
    assert not any(tally.counts[column] for column in COLUMNS), "\n" + HEAD + "\n" + tally.report()


# The public surface


def test_every_public_callable_has_a_strategy():
    """Else it would not be fuzzed; the message says what is lacking in fuzzing/surface.py."""
    lacking = [line for callee in CALLEES for line in surface.unknown(callee)]
    assert not lacking, "\n".join(lacking)


@pytest.mark.parametrize("callee", CALLEES, ids=lambda callee: callee.name)
def test_the_call_with_right_values_works(callee):
    """A call that is refused as it stands would hide what its arguments do."""
    call = callee.call({one.name: one.right or "" for one in callee.arguments})
    undefined = callee.short in surface.UNDEFINED
    assert judged(Case(call, callee.name, undefined=undefined), NAMES)[0] == "fine", call


@cache
def own_kinds(argument: surface.Argument) -> tuple[str, ...]:
    """Kinds that strategies are drawn from: of arrays and tensors the one that the right value is."""
    kinds = set(argument.kinds)
    right = eval(argument.right or "None", NAMES)
    kinds -= {"mapping"} if not hasattr(right, "items") else set()
    kinds -= {"sequence"} if not hasattr(right, "__len__") else set()
    if kinds & {"array", "tensor"}:
        kinds -= {"array", "tensor"}
        kinds |= {"tensor"} if isinstance(right, things.torch.Tensor) else set()
        kinds |= {"array"} if isinstance(right, things.np.ndarray) else set()
    return tuple(sorted(kinds))


@st.composite
def wrong_kinds(draw: st.DrawFn) -> Case:
    """A call with one value that is of another kind than the documentation says, or looks like the right one."""
    callee, argument = draw(st.sampled_from([(callee, one) for callee in CALLEES for one in callee.arguments]))
    right = {one.name: one.right or "None" for one in callee.arguments}
    undefined = callee.short in surface.UNDEFINED
    common = {"about": f"{callee.name}({argument.name})", "undefined": undefined, "arguments": surface.words(callee)}
    alike = [
        template.format(right[argument.name])
        for kind in own_kinds(argument)
        for template in values.LOOKALIKES.get(kind, ())
        if right[argument.name] != "None"
    ]
    if alike and draw(st.integers(0, 3)) == 0:
        changed = right | {argument.name: draw(st.sampled_from(alike))}
        return Case(callee.call(changed), right=callee.call(right), **common)
    value = draw(st.sampled_from(sorted(values.WRONG)))
    refused = not argument.kinds & {*values.WRONG[value], "any"}
    return Case(callee.call(right | {argument.name: value}), refused=refused, **common)


def test_wrong_kinds_of_value(request):
    fuzz("calls, wrong kinds of value", wrong_kinds(), 250, request)


@st.composite
def odd_values(draw: st.DrawFn) -> Case:
    """A call with one value, or two, of the right kind, that nobody would pass on purpose."""
    pairs = [(callee, one) for callee in CALLEES for one in callee.arguments if set(own_kinds(one)) & set(values.ODD)]
    callee, argument = draw(st.sampled_from(pairs))
    right = {one.name: one.right or "None" for one in callee.arguments}
    others = [one for one in callee.arguments if one != argument and set(own_kinds(one)) & set(values.ODD)]
    chosen = [argument, *([draw(st.sampled_from(others))] if others and draw(st.integers(0, 9)) == 0 else [])]
    changed, refused = dict(right), False
    for one in chosen:
        changed[one.name], no_number = draw(odd_value(one, right[one.name]))
        refused |= no_number and f"{callee.short}({one.name})" not in surface.MAY_BE_NAN
    call = callee.call(changed)
    return Case(
        call,
        f"{callee.name}({argument.name})",
        refused=refused,
        undefined=callee.short in surface.UNDEFINED,
        oracle=surface.oracle(callee, changed, NAMES),
        memory=True,
    )


@st.composite
def odd_value(draw: st.DrawFn, argument: surface.Argument, right: str) -> tuple[str, bool]:
    """Source of an odd value, and whether it must be refused."""
    kind = draw(st.sampled_from([kind for kind in own_kinds(argument) if kind in values.ODD]))
    if kind in values.NOT_NUMBERS and draw(st.integers(0, 4)) == 0:
        template = draw(st.sampled_from(values.NOT_NUMBERS[kind]))
        return template.format(right, n=draw(st.integers(0, 40))), right != "None" or kind == "float"
    template = draw(st.sampled_from(values.ODD[kind]))
    if right == "None" and "{" in template.replace("{{", ""):
        return "None", False
    value = template if kind in ("int", "float", "str", "path", "bool") else template.format(right, right)
    if kind in ("int", "float") and argument.name in surface.LIMITS:
        least, most = surface.LIMITS[argument.name]
        number = eval(value)
        return value, (least is not None and number < least) or (most is not None and number > most)
    return value, False


def test_odd_values_of_the_right_kind(request):
    fuzz("calls, odd values", odd_values(), 250, request)


FOUND = {
    "llvlit.engine.tokens.tokenize(model, prompts).batches(100, '3')": "device",
    "llvlit.method.bases.orthonormal_basis(np.ma.masked, order=4)": "vectors",
    "llvlit.method.bases.krylov_basis(model.module, matrix[0], order=4)": "apply",
    "llvlit.method.surrogate.markov_parameters(surrogate.A * 1e300, surrogate.C)": "operators",
    "llvlit.publishing.explorer.export_explorer(model, splits, directions, openings=Hostile())": "openings",
    "llvlit.study.tables.means(frame, np.ma.masked, ['x'])": "by",
    "llvlit.study.tables.means(frame.iloc[:0], ['model'], ['x'])": "",
    "llvlit.study.tables.summarize_energies(energies, ['a', 'b'])": "frame",
    "system.propagate(system.states[:, :1], inputs=torch.ones(2, device='meta'))": "inputs",
    "dry_run(as_toml(put(GRID, ['tasks', 1], 1)))": "task",
}


@pytest.mark.parametrize("call", FOUND)
def test_faults_of_long_runs_stay_mended(call):
    """Calls that only thousands of draws have found; the word is what the refusal must name, where one is due."""
    expected = "refused" if FOUND[call] else "fine"
    case = Case(call, call, refused=expected == "refused", arguments=(FOUND[call],))
    assert judged(case, NAMES)[0] == expected


# Files


WHOLE = (
    *("read_gains(GAINS)", "read_llv(LLV)", "read_cell(as_json(CELL))", "read_csv(AGREEMENT)", "read_task(TASK)"),
    *(f"used({name!r})" for name in documents.CONFIGS),
    *("sharded(INDEX)", "read_grid(GRID_TOML)", "dry_run(GRID_TOML)", "report({})", "read_committed({})"),
    *("trained(CORPUS)", "trained(LINES)", "published({})", "published({}, {})", "exercises({})"),
)


@pytest.mark.parametrize("call", WHOLE)
def test_whole_files_are_read(call):
    """A reader that refuses the file as it stands would hide what changes do."""
    assert judged(Case(call, call), NAMES) == ("fine", ""), call


RESULTS = [
    ("Gains.load", "read_gains", "GAINS", documents.GAINS),
    ("LLV.load", "read_llv", "LLV", documents.LLV),
    ("load_recommendation", "read_plan", "PLAN", documents.PLAN),
    ("load_results", "read_cell", "as_json(CELL)", documents.as_json(documents.CELL)),
    ("read_table", "read_csv", "AGREEMENT", documents.AGREEMENT),
]


@st.composite
def result_files(draw: st.DrawFn) -> Case:
    """A cut or tampered result; what is loaded nevertheless must be the same numbers."""
    about, reader, name, data = draw(st.sampled_from(RESULTS))
    kind = draw(st.integers(0, 2))
    right = "" if name == "AGREEMENT" else f"{reader}({name})"
    oracle = documents.table_kinds if name == "AGREEMENT" else None
    if kind == 0 and name == "as_json(CELL)":
        return Case(f"{reader}(as_json({draw(document_changes('CELL', documents.CELL))}))", about, right=right)
    if kind == 0 and right:
        place = draw(st.sampled_from(_headers(data)))
        value = draw(st.sampled_from(ODD_JSON))
        return Case(f"{reader}(header({name}, {place}, {value}))", about, right=right)
    return Case(f"{reader}({draw(byte_changes(name, len(data)))})", about, right=right, oracle=oracle)


def _headers(data: bytes) -> list[list[str | int]]:
    document = documents.json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    inner = documents.json.loads(document["__metadata__"]["llvlit"])
    found = [list(place) for place in documents.places(document)]
    return found + [["__metadata__", "llvlit", *place] for place in documents.places(inner, depth=2)]


def test_tampered_result_files(request):
    fuzz("result files", result_files(), 120, request)


@st.composite
def configurations(draw: st.DrawFn) -> Case:
    """A model whose configuration has one key changed: what loads must be usable."""
    name = draw(st.sampled_from(sorted(documents.CONFIGS)))
    change = draw(document_changes(f"CONFIGS[{name!r}]", documents.CONFIGS[name]))
    return Case(f"used({name!r}, config__json=as_json({change}))", "config.json", oracle=documents.linear_enough)


def test_model_configurations(request):
    fuzz("model configurations", configurations(), 50, request, share=0.4)


@st.composite
def tokenizers(draw: st.DrawFn) -> Case:
    """A model whose tokenizer, its configuration or its weights have changed."""
    kind = draw(st.integers(0, 4))
    if kind == 0:
        change = f"tokenizer__json=as_json({draw(document_changes('TOKENIZER', documents.TOKENIZER))})"
    elif kind == 1:
        change = (
            f"tokenizer_config__json=as_json({draw(document_changes('TOKENIZER_CONFIG', documents.TOKENIZER_CONFIG))})"
        )
    elif kind == 2:
        change = f"generation_config__json=as_json({draw(document_changes('GENERATION', documents.GENERATION))})"
    elif kind == 3:
        change = f"model__safetensors={draw(byte_changes('WEIGHTS', 2000))}"
    else:
        name = draw(
            st.sampled_from(("config__json", "tokenizer__json", "tokenizer_config__json", "model__safetensors"))
        )
        source = {"config__json": "as_json(CONFIGS['gpt2'])", "tokenizer__json": "as_json(TOKENIZER)"}
        source |= {"tokenizer_config__json": "as_json(TOKENIZER_CONFIG)", "model__safetensors": "WEIGHTS"}
        change = f"{name}={draw(st.one_of(st.just('None'), byte_changes(source[name], 200)))}"
    return Case(f"used('gpt2', {change})", change.partition("=")[0])


def test_tokenizers_and_weights(request):
    fuzz("tokenizers and weights", tokenizers(), 30, request, share=0.2)


PLACES = (
    *(
        "pickle.bin",
        "pickle.pt",
        "pickle.safetensors",
        "../outside.safetensors",
        "/dev/zero",
        "folder",
        "absent.safetensors",
    ),
    *("link.safetensors", "zero.safetensors", "", ".", "..", "../model/shard.safetensors", "\0", "a" * 5000),
    *(
        "config.json",
        "file:///etc/passwd",
        "https://example.org/a.safetensors",
        "~/x.safetensors",
        "shard.safetensors/x",
    ),
)


@st.composite
def shard_indexes(draw: st.DrawFn) -> Case:
    """An index of shards that names anything: nothing outside the folder is read, nothing but safetensors loaded."""
    kind = draw(st.integers(0, 2))
    if kind == 0:
        return Case(f"sharded(INDEX, {draw(st.sampled_from(PLACES))!r})", "shard", refused=True)
    if kind == 1:
        return Case(
            f"sharded(as_json({draw(document_changes('INDEX', documents.INDEX))}))", "index", right="sharded(INDEX)"
        )
    size = len(documents.as_json(documents.INDEX))
    change = draw(byte_changes("as_json(INDEX)", size))
    return Case(f"sharded({change})", "index", right="sharded(INDEX)")


def test_shard_indexes(request):
    fuzz("indexes of shards", shard_indexes(), 30, request, share=0.2)


@st.composite
def grids(draw: st.DrawFn) -> Case:
    """A grid with one value changed, or some bytes: read, or refused before anything runs."""
    if draw(st.integers(0, 2)):
        change = f"as_toml({draw(document_changes('GRID', documents.GRID))})"
    else:
        change = draw(byte_changes("GRID_TOML", len(documents.GRID_TOML)))
    return Case(f"{'dry_run' if draw(st.integers(0, 9)) == 0 else 'read_grid'}({change})", "grid")


def test_grids(request):
    fuzz("grids", grids(), 150, request)


@st.composite
def task_files(draw: st.DrawFn) -> Case:
    """A parquet file with other columns, kinds of value, or bytes."""
    if draw(st.integers(0, 2)) == 0:
        return Case(f"read_task({draw(byte_changes('TASK', len(documents.TASK)))})", "parquet bytes")
    label = draw(st.sampled_from(LABELS))
    text = draw(st.sampled_from(TEXTS))
    more = draw(st.sampled_from(("", "", "", ", other=[None] * 8", ", Text=['x'] * 8")))
    drop = draw(st.sampled_from(("", "", "", "", "text", "label")))
    columns = [f"{name}={value}" for name, value in (("text", text), ("label", label)) if name != drop]
    return Case(f"read_task(table_of({', '.join(columns)}{more}))", "parquet columns", refused=bool(drop))


LABELS = (
    *("[1, 0] * 4", "[1.0, 0.0] * 4", "[True, False] * 4", "['1', '0'] * 4", "[1, None] * 4", "[1, 2] * 4"),
    *("[-1, 1] * 4", "[0.5, 0] * 4", "[float('nan'), 1] * 4", "[[1], [0]] * 4", "[{'a': 1}] * 8", "[None] * 8"),
    *("[Decimal(1), Decimal(0)] * 4", "[datetime.datetime(2026, 1, 1)] * 8", "[b'1', b'0'] * 4", "[2**63 - 1, 0] * 4"),
)
TEXTS = (
    *("['a good film', 'a dull film'] * 4", "['a', None] * 4", "['', ' '] * 4", "[b'a', b'b'] * 4", "[1, 2] * 4"),
    *("[['a'], ['b']] * 4", "['\\0', '\\n'] * 4", "['é👀', '\\u200b'] * 4", "['a' * 10**6, 'b'] * 4"),
    *("[{'a': 'b'}] * 8", "[b'\\xff'] * 8"),
)


def test_parquet_tasks(request):
    fuzz("parquet tasks", task_files(), 60, request, share=0.3)


# Folders


ODD_FILES = (
    *(
        "b''",
        "b'\\xff\\xfe'",
        "None",
        "b'absent'",
        "b'null'",
        "b'[]'",
        "b'{}'",
        "b'1'",
        "b'\"a\"'",
        "b'NaN'",
        "b'[' * 99_999",
    ),
    *("b'a\\n'", "b',,,\\n'", "b'---\\n'", "b'a: [b\\n'", "b'\\0'"),
)


@st.composite
def results_folders(draw: st.DrawFn) -> Case:
    """A folder of results, or a committed study, with one file changed, emptied, gone, or a folder in its place."""
    committed = draw(st.booleans())
    files = documents.TABLES if committed else {n: d for n, d in documents.STUDY.items() if not n.startswith("report/")}
    name = draw(st.sampled_from(sorted(files)))
    source = f"{'TABLES' if committed else 'STUDY'}[{name!r}]"
    kind = draw(st.integers(0, 2))
    if kind == 0:
        change = draw(st.sampled_from(ODD_FILES))
    elif kind == 1 and name.endswith(".json"):
        document = {"grid.json": "GRID_JSON", "provenance.json": "PROVENANCE"}.get(name, "CELL")
        change = f"as_json({draw(document_changes(document, getattr(documents, document)))})"
    else:
        change = draw(byte_changes(source, len(files[name])))
    reader = "read_committed" if committed else "report"
    oracle = None if committed else says_no_nan
    return Case(f"{reader}({{{name!r}: {change}}})", f"{reader} {name.partition('/')[0]}", oracle=oracle)


def test_tampered_results_folders(request):
    fuzz("results folders", results_folders(), 30, request, share=0.2)


def says_no_nan(text: str) -> str:
    """Whether a command printed what is no number."""
    found = re.search(r"(?<![\w./-])[-+]?(nan|inf|infinity)(?![\w./-])", text, re.IGNORECASE)
    return f"exit 0 with {found[0]}: {text[max(0, found.start() - 80) : found.end()]}" if found else ""


@st.composite
def corpora(draw: st.DrawFn) -> Case:
    """A corpus with a file changed or added, or in another layout."""
    name = draw(st.sampled_from(("CORPUS", "LINES")))
    files = getattr(documents, name)
    change = draw(
        st.sampled_from(
            (
                *(
                    "b''",
                    "b'\\xff\\xfe\\xff'",
                    "None",
                    "b'\\0'",
                    "zipped('x')",
                    "zipped('abc\\tA film.')",
                    "zipped(b'\\xff')",
                ),
                *(
                    "zipped('11\\tA film.')",
                    "zipped('-1\\tA film.')",
                    "zipped('\\n\\n')",
                    "zipped('9\\t')",
                    "zipped('')",
                ),
                *("cut(zipped('9\\tA film.' * 99), 30)", "zipped('9.5\\tA film.')", "b'A film.'"),
            )
        )
    )
    extra = ("train/pos/x_abc.txt", "train/pos/x_99.txt", "train/pos/x.txt", "train/neg/0_-1.txt", "train/pos/0_5.txt")
    if name == "LINES":
        extra = ("b.tsv.gz", "b.txt.gz", "a.tsv.gz", "rated.tsv.gz", "plain.txt.gz")
    place = draw(st.sampled_from((*sorted(files), *extra * 3)))
    if draw(st.integers(0, 3)) == 0:
        return Case(f"trained({{{place!r}: {change}}})", f"corpus {name}", oracle=says_no_nan)
    return Case(f"trained({{**{name}, {place!r}: {change}}})", f"corpus {name}", oracle=says_no_nan)


def test_corpora(request):
    fuzz("corpora", corpora(), 10, request, share=0.03)


@st.composite
def publications(draw: st.DrawFn) -> Case:
    """The site of a built book with a file changed, a previous site changed, or a link in it."""
    name = draw(st.sampled_from(sorted(documents.BUILT)))
    kind = draw(st.integers(0, 4))
    version = draw(st.sampled_from(("'latest'", "'v0.1.0'", "'v1.0.0'")))
    if kind == 0:
        link = draw(st.sampled_from(("v0.1.0/id", "id", "v0.1.0/folder", "folder", "v0.2.0", "latest")))
        return Case(f"published({{}}, {{}}, {link!r}, {version})", "publish link")
    if kind == 1:
        place = draw(st.sampled_from(("versions.json", "index.html", "v0.1.0/index.html", "vx", "CNAME", "v9.9.9")))
        return Case(
            f"published({{}}, {{{place!r}: {draw(st.sampled_from(ODD_FILES))}}}, '', {version})", "publish previous"
        )
    if kind == 2:
        change = f"as_json({draw(document_changes('NOTEBOOK', documents.NOTEBOOK))})"
        return Case(f"published({{'_build/html/_sources/book/sums.ipynb': {change}}})", "publish notebook")
    change = draw(st.one_of(st.sampled_from(ODD_FILES), byte_changes(f"BUILT[{name!r}]", len(documents.BUILT[name]))))
    return Case(f"published({{{name!r}: {change}}})", f"publish {name}")


def test_publications(request):
    fuzz("publish", publications(), 25, request, share=0.1)


@st.composite
def chapters(draw: st.DrawFn) -> Case:
    """A book whose chapter, table of contents, configuration or bibliography has changed."""
    name = draw(st.sampled_from(("book/sums.md", "book/sums.md", *sorted(documents.BOOK))))
    kind = draw(st.integers(0, 2))
    if kind == 0:
        change = draw(st.sampled_from(ODD_FILES))
    elif kind == 1 and name == "book/sums.md":
        lines = documents.CHAPTER.decode().splitlines()
        line = draw(st.sampled_from([line for line in lines if line.strip()])).encode()
        new = draw(st.sampled_from((b"", line + b"\n" + line, line[:-1], line * 2, b"````", b"```{solution-end}\n```")))
        change = f"BOOK[{name!r}].replace({line!r}, {new!r})"
    else:
        change = draw(byte_changes(f"BOOK[{name!r}]", len(documents.BOOK[name])))
    return Case(f"exercises({{{name!r}: {change}}})", f"exercises {name}")


def test_exercises_and_chapters(request):
    fuzz("exercises and chapters", chapters(), 15, request, share=0.1)


# Commands


_EXPERIMENT = [
    "--model",
    "MODEL_FOLDER",
    "--task",
    "film-sentiment",
    "--prompts",
    "3",
    "--device",
    "cpu",
    "--seed",
    "0",
]
COMMANDS = (
    ["gains", *_EXPERIMENT, "--order", "4", "--basis", "reachability", "--amplitude", "0.1", "--no-plot"],
    ["gains", *_EXPERIMENT, "--order", "4", "--plot", "gains.png", "--save", "llv.safetensors", "--json"],
    ["steer", "The film", *_EXPERIMENT, "--inputs", "1:1%", "--tokens", "2", "--positions", "all"],
    ["study", "GRID_FILE", "--dry-run", "--device", "cpu", "--seeds", "0", "--prompts", "2", "--workers", "1"],
    ["study", "GRID_FILE", "--report", "--out", "STUDY_FOLDER", "--save", "report"],
    ["train", "--corpus", "CORPUS_FOLDER", "--out", "run", "--sizes", "1x32", "--steps", "1", "--keep", "0"],
    ["tasks", "--json", "--data-dir", "DATA_FOLDER"],
    ["models"],
    ["exercises", "--root", "BOOK_FOLDER", "--out", "course", "--force"],
    ["publish", "--root", "BUILT_FOLDER", "--version", "v0.1.0", "--site", "site", "--revision", "main"],
    ["book", "--root", "book", "--profile", "embedded", "--chapters", "gains", "--jobs", "1", "--device", "cpu"],
)
SOURCES = {
    "MODEL_FOLDER": "MODEL_FOLDER",
    "GRID_FILE": "GRID_FILE",
    "BOOK_FOLDER": "str(folder_of(BOOK))",
    "BUILT_FOLDER": "str(folder_of(BUILT))",
    "CORPUS_FOLDER": "str(folder_of(CORPUS))",
    "STUDY_FOLDER": "str(folder_of(STUDY))",
    "DATA_FOLDER": "str(folder_of({'mine.parquet': TASK}))",
}
STRINGS = (
    *(
        "''",
        "' '",
        "'-1'",
        "'0'",
        "'1'",
        "'2'",
        "'nan'",
        "'inf'",
        "'1e400'",
        "'1e-320'",
        "'1e20'",
        "'abc'",
        "'/dev/null'",
    ),
    *(
        "'.'",
        "'..'",
        "'\\0'",
        "'é👀'",
        "'\\udcff'",
        "'a' * 5000",
        "'9' * 30",
        "'0x10'",
        "'1_0'",
        "'٣'",
        "'--json'",
        "'-h'",
    ),
    *(
        "'/dev/zero'",
        "'/dev/null/x'",
        "'gpt2'",
        "'$x_'",
        "'a\\nb'",
        "'%s {}'",
        "'v1'",
        "'cuda'",
        "'meta'",
        "'mps'",
        "MODEL_FOLDER",
    ),
)
NUMERIC = {
    "--prompts",
    "--seed",
    "--order",
    "--amplitude",
    "--target",
    "--tokens",
    "--seeds",
    "--workers",
    "--steps",
    "--jobs",
}
OPTIONS = (  # no --compile: a compiler works for a minute, in processes of its own, and is no bad input
    *("--json", "--dry-run", "--report", "--force", "--pdf", "--other", "-x", "--", "--help", "--no-plot"),
)


@st.composite
def command_lines(draw: st.DrawFn) -> Case:
    """A command with one word changed, dropped, doubled or added."""
    words = draw(st.sampled_from(COMMANDS))
    source = [SOURCES.get(word, repr(word)) for word in words]
    kind = draw(st.integers(0, 9))
    places = [at for at, word in enumerate(words) if at and not word.startswith("-")]
    refused = False
    if kind <= 6 and places:
        at = draw(st.sampled_from(places))
        value = draw(st.sampled_from(STRINGS))
        refused = words[at - 1] in NUMERIC and value in ("'nan'", "'inf'", "'1e400'", "'abc'", "''")
        source[at] = value
    elif kind == 7:
        source.insert(draw(st.integers(0, len(source))), repr(draw(st.sampled_from(OPTIONS))))
    elif kind == 8 and words[0] != "study":
        del source[draw(st.integers(0, len(source) - 1))]
    else:
        at = draw(st.integers(0, len(source) - 1))
        source.insert(at, source[at])
    plain = not re.search("nan|inf|--json|--help|-h", " ".join(source))
    return Case(f"command([{', '.join(source)}])", words[0], refused=refused, oracle=says_no_nan if plain else None)


def test_command_lines(request):
    fuzz("command lines", command_lines(), 80, request, share=0.5)
