"""Values for arguments: wrong kinds, lookalikes of the right one, and odd values of the right kind; all as source."""

from __future__ import annotations

LISTS = ("sequence", "array", "tensor")

WRONG: dict[str, tuple[str, ...]] = {
    "None": ("none",),
    "True": ("bool",),
    "1 + 2j": (),
    "2.5": ("float",),
    "float('nan')": (),
    "Decimal('NaN')": (),
    "'abc'": ("str", "path", "sequence", "dtype"),
    "'3'": ("str", "path", "sequence"),
    "b'abc'": ("sequence",),
    "()": LISTS,
    "[]": LISTS,
    "[1.0, 2.0]": LISTS,
    "['a', 'b']": ("sequence",),
    "[None]": ("sequence",),
    "[[1], [1, 2]]": ("sequence",),
    "[object()]": ("sequence",),
    "{}": ("mapping", "sequence"),
    "{'a': 1}": ("mapping", "sequence"),
    "{1, 2}": ("sequence",),
    "object()": (),
    "Hostile()": (),
    "Mute()": (),
    "lambda *a: 0": ("callable",),
    "int": ("callable",),
    "slice(1)": ("slice",),
    "...": (),
    "NotImplemented": (),
    "range(3)": LISTS,
    "iter([1])": ("sequence",),
    "nested(3000)": ("sequence",),
    "datetime.datetime(2026, 1, 1)": (),
    "Path('nowhere')": ("path",),
    "np.zeros(0)": LISTS,
    "np.array('x')": (),
    "np.array(['a', 'b'])": ("sequence",),
    "np.array([None, 1])": ("sequence",),
    "np.array([1 + 1j])": ("sequence",),
    "np.array(['2026-01-01'], dtype='datetime64')": ("sequence",),
    "np.ma.masked": (),
    "torch.ones(2, device='meta')": (),
    "torch.ones(3, dtype=torch.complex64)": ("sequence",),
    "torch.eye(2).to_sparse()": LISTS,
    "torch.float16": ("dtype",),
    "pd.NA": (),
    "pd.NaT": (),
    "pd.DataFrame()": ("DataFrame", *LISTS),
    "pd.Series(dtype=float)": ("Series", *LISTS),
    "model": ("LanguageModel",),
    "prompts": ("Prompts", "sequence"),
    "directions": ("Directions",),
    "gains": ("Gains",),
    "surrogate": ("LLV",),
    "splits": ("Splits",),
    "system": ("DepthSystem",),
    "model.module": ("PreTrainedModel", "Module"),
    "10**400": ("int",),
}
"""Source of a value, and the kinds that it is one of; for an argument of every other kind it has no meaning."""

LOOKALIKES: dict[str, tuple[str, ...]] = {
    "int": ("np.int64({})", "np.array({})", "torch.tensor({})", "float({})", "Fraction({})", "np.uint8({})"),
    "float": ("np.float64({})", "np.array({})", "torch.tensor({}, dtype=torch.float64)", "Fraction({})", "Decimal({})"),
    "bool": ("np.bool_({})", "int({})", "np.array({})", "torch.tensor({})", "str({})"),
    "str": ("np.str_({})", "Text({})"),
    "path": ("Path({})", "Text({})", "os.fsencode({})"),
    "array": ("{}.tolist()", "torch.as_tensor({})", "np.asfortranarray({})", "{}.astype(object)", "{}.astype('>f8')"),
    "tensor": (
        "{}.numpy()",
        "{}.tolist()",
        "{}.double()",
        "{}.clone().requires_grad_()",
        "{}.transpose(0, -1).contiguous().transpose(0, -1)",
    ),
    "sequence": ("list({})", "tuple({})", "np.array({}, dtype=object)", "pd.Series(list({}), dtype=object)"),
    "mapping": ("MappingProxyType({})", "collections.OrderedDict({})"),
}
"""What may stand for a right value ``{}``: the result must be the same, or the value refused."""

ODD: dict[str, tuple[str, ...]] = {
    "int": ("0", "-1", "1", "2", "3", "7", "100", "10**6", "10**9", "2**31", "2**63", "-(2**63)", "10**40"),
    "float": ("0.0", "-0.0", "-1.0", "1e-300", "1e-12", "1e-8", "1e-4", "0.5", "1.0", "3.0", "1e4", "1e20", "1e300"),
    "bool": ("True", "False"),
    "str": (
        *("''", "' '", "'a' * 100_000", "'\\0'", "'\\ud800'", "'../..'", "'/'", "'.'", "'~nobody/x'", "'$x_'", "'é👀'"),
        *("'a\\nb'", "'%s{}'", "'nan'", "'Mean_difference'", "'-1'", "'CON'"),
    ),
    "path": ("''", "'/'", "'.'", "'\\0'", "'\\ud800'", "'/dev/zero'", "'/dev/null/x'", "'~nobody/x'", "'a' * 5000"),
    "array": (
        *("{}[:-1]", "{}[None]", "{}[..., None]", "{}[:0]", "{} * 0", "{} * -1", "{} * 1e-300", "{} * 1e-30"),
        *("{} * 1e30", "{} * 1e300", "np.concatenate([{}, {}])", "{}[::-1]", "{}.astype('float16')", "{}.astype(bool)"),
        *("{}.astype(int)", "abs({})", "{} * 0 + 1", "np.zeros((2, 0, 3))", "spoiled({}, 1e308)", "{}.T"),
    ),
    "tensor": (
        *("{}[:-1]", "{}[None]", "{}[..., None]", "{}[:0]", "{} * 0", "{} * -1", "{} * 1e-300", "{} * 1e-30"),
        *("{} * 1e30", "{}.half()", "{}.bfloat16()", "{}.bool()", "{}.long()", "{} * 0 + 1", "torch.zeros(2, 0, 3)"),
        *("{}.flatten()", "spoiled({}, 1e38)", "torch.cat([{}, {}])", "{}[..., :-1]"),
    ),
    "sequence": ("{}[:0]", "{}[:1]", "list({}) * 2", "list({})[::-1]", "list({}) + [None]", "iter({})"),
    "mapping": (
        "{{}}",
        "{{**{}, 'other': 1}}",
        "{{key: None for key in {}}}",
        "{{str(key) * 2: value for key, value in {}.items()}}",
    ),
    "Prompts": (
        *("llvlit.Prompts(['a film'], [1])", "llvlit.Prompts([''], [0])", "llvlit.Prompts(['a', 'b'], [0, 1])"),
        *("llvlit.Prompts(['a film'] * 4, [0, 1] * 2)", "llvlit.Prompts(['a film', 'no film'], [1, 1])"),
        *("llvlit.Prompts(['x' * 3000, 'a film'], [0, 1])", "llvlit.Prompts(['é👀 \\0', 'ab'], [0, 1])"),
    ),
    "DataFrame": (
        *("{}.iloc[:0]", "{}.iloc[:1]", "{}.drop(columns='task', errors='ignore')", "{}.assign(seed=None)", "{} * 1"),
        "{}.T",
    ),
    "Series": ("{}.iloc[:0]", "{} * float('nan')", "{} * 0", "{} * -1e300", "{}.astype(str)"),
}
"""Values of the right kind (``{}``: the usual one) that may be refused or not, but never give nonsense."""

NOT_NUMBERS = {
    "float": ("float('nan')", "float('inf')", "-float('inf')"),
    "array": ("spoiled({}, float('nan'), {n})", "spoiled({}, float('inf'), {n})"),
    "tensor": ("spoiled({}, float('nan'), {n})", "spoiled({}, -float('inf'), {n})"),
}
"""What must be refused wherever numbers are expected."""
