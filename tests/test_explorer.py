"""The explorer's table is the surrogate's response, and its page's numbers are the package's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import EXACT, PROMPTS, tiny_model
from llvlit.engine.depth import depth_system
from llvlit.errors import InputError
from llvlit.method.agreement import agreement
from llvlit.method.concepts import concept_directions
from llvlit.method.control import energy, minimum_energy, relative_weights, schedules
from llvlit.method.gains import measured_gains
from llvlit.method.identification import identify
from llvlit.prompts import Prompts
from llvlit.publishing.explorer import explorer_html, export_explorer, responses
from llvlit.tasks.splits import Splits

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Explorer</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="explorer.css"><script src="explorer.js"></script></head>
<body><main><h1>Explorer</h1>{element}</main></body></html>
"""
SAME = 1e-9
"""The page computes in float64 from numbers written in full: far below the 1e-5 that readers are promised."""

OTHERS = Prompts(("a good day", "not good", "what a bad film", "truly lovely"), (1, 0, 0, 1))
SPLITS = Splits(PROMPTS, PROMPTS, OTHERS)


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2", num_hidden_layers=7)


@pytest.fixture(scope="module")
def llv(model):
    directions = concept_directions(model, SPLITS.concept)
    return identify(model, SPLITS.operating, directions, order=16, basis="reachability")


@pytest.fixture(scope="module")
def document(model):
    return export_explorer(iter([model, second_model()]), {"one": SPLITS, "two <b>": SPLITS}, order=16)


@pytest.fixture(scope="module")
def weights(model):
    return relative_weights(depth_system(model, SPLITS.operating).states)


def second_model():
    """One of another name, with more layers than a phone is wide."""
    return replace(tiny_model("gpt2", seed=4, num_hidden_layers=14), name="tiny-gpt2 2")


def table_of(case) -> np.ndarray:
    """G with its zeros."""
    table = np.zeros((case["n_layers"] + 1, case["n_layers"]))
    for state, row in enumerate(case["response"]):
        table[state, : len(row)] = row
    return table


def test_responses_are_what_a_push_has_become_at_every_state(llv, generator):
    table = responses(llv)
    for layer in range(llv.n_layers):  # oracle: products of matrices, one push at a time
        state = np.eye(llv.order)[0]
        assert np.array_equal(table[:layer, layer], np.zeros(layer))
        for later in range(layer, llv.n_layers):
            assert abs(table[later, layer] - state[0]) < EXACT * max(1, np.abs(state).max())
            state = llv.A[later] @ state
        assert abs(table[-1, layer] - llv.C @ state) < EXACT * np.abs(state).max()
    assert np.allclose(table[-1], llv.gains(), rtol=EXACT, atol=EXACT)


def test_case_holds_the_packages_numbers(model, llv, document, weights):
    case = json.loads(json.dumps(document))["cases"][0]
    directions = concept_directions(model, SPLITS.concept)
    measured = measured_gains(model, SPLITS.evaluation, directions)
    assert np.array_equal(table_of(case), responses(llv))
    assert np.allclose(1 / np.square(case["norms"]), weights, rtol=EXACT)
    assert case["gap"] == directions.gaps[-1]
    assert np.allclose(case["measured"], measured.mean, rtol=EXACT)
    assert np.allclose([case["low"], case["high"]], measured.interval(), rtol=EXACT)
    assert case["relative_error"] == pytest.approx(agreement(llv.gains(), measured).relative_error)
    assert case["model_fingerprint"] == model.fingerprint
    assert (case["operating_fingerprint"], case["evaluation_fingerprint"]) == (PROMPTS.fingerprint, OTHERS.fingerprint)
    assert [(one["model"], one["task"], one["n_layers"]) for one in document["cases"][1:3]] == [
        ("tiny-gpt2", "two <b>", 7),
        ("tiny-gpt2 2", "one", 14),
    ]


def test_case_takes_the_hidden_size_where_the_order_is_larger(model):
    assert export_explorer([model], {"one": SPLITS}, order=1000)["cases"][0]["order"] == model.hidden_size


def test_export_refuses_nothing_and_what_json_cannot_say(model):
    with pytest.raises(InputError, match="models or tasks is empty"):
        export_explorer([], {"one": SPLITS})
    with pytest.raises(InputError, match="cannot be written as JSON"):
        explorer_html({"cases": [float("nan")]})


def test_element_holds_the_document_and_no_tag_of_it(document):
    element = explorer_html(document)
    data = element.split('<script type="application/json">')[1].split("</script>")[0]
    assert json.loads(data) == document
    assert "<b>" not in element
    assert "JavaScript is off" in element.split("<noscript>")[1].split("</noscript>")[0]


@pytest.fixture
def address(tmp_path, document):
    for name in ("explorer.js", "explorer.css"):
        (tmp_path / name).write_bytes((STATIC / name).read_bytes())
    (tmp_path / "page.html").write_text(PAGE.format(element=explorer_html(document)), encoding="utf-8")
    return (tmp_path / "page.html").as_uri()


@pytest.fixture
def page(browser, address):
    """The explorer at desktop width; afterwards, nothing may have gone wrong or out."""
    context = browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text) if message.type in {"error", "warning"} else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file://") else faults.append(request.url))
    page.goto(address)
    page.locator(".llvlit-explorer[data-ready]").wait_for()
    page.locator("[data-role=model]").select_option("tiny-gpt2")
    yield page
    assert faults == []
    context.close()


def shown(page) -> dict:
    """Full-precision numbers of the page."""
    data = page.locator(".llvlit-explorer").evaluate("element => ({...element.dataset})")
    kept = {"model", "task", "metric", "ready"}
    return {name: value if name in kept else json.loads(value) for name, value in data.items()}


def check(page, llv, case, weights=None, inputs=None) -> dict:
    """Every number of the page is the package's, for the pushes that the page holds (or the given ones)."""
    found = shown(page)
    inputs = np.array(found["inputs"] if inputs is None else inputs)
    assert np.allclose(found["inputs"], inputs, rtol=SAME, atol=SAME)
    trace = llv.simulate(inputs)
    expected = np.append(trace.states[:-1, 0] + inputs, trace.output)  # right after each state's own push
    best = minimum_energy(llv.gains(), float(trace.output), weights=weights)
    answer = llv.simulate(best)
    assert np.allclose(np.array(found["shift"]) * case["gap"], expected, rtol=SAME, atol=SAME)
    best_shift = np.append(answer.states[:-1, 0] + best, answer.output)
    assert np.allclose(np.array(found["bestShift"]) * case["gap"], best_shift, rtol=SAME, atol=SAME)
    assert np.allclose(found["best"], best, rtol=SAME, atol=SAME)
    assert found["output"] == pytest.approx(float(trace.output) / case["gap"], rel=SAME, abs=SAME)
    assert found["energy"] == pytest.approx(energy(inputs, weights=weights), rel=SAME)
    assert found["optimum"] == pytest.approx(energy(best, weights=weights), rel=SAME)
    assert found["measuredOutput"] * case["gap"] == pytest.approx(float(inputs @ case["measured"]), rel=SAME, abs=SAME)
    if inputs.any():
        ratio = energy(inputs, weights=weights) / energy(best, weights=weights)
        assert found["ratio"] == pytest.approx(ratio, rel=SAME)
    return found


def press(page, role):
    page.locator(f"[data-role={role}]").focus()
    page.keyboard.press("Enter")


@pytest.mark.parametrize("metric", ["absolute", "relative"])
def test_schedules_equal_the_packages(page, llv, document, weights, metric):
    case, scale = document["cases"][0], weights if metric == "relative" else None
    page.get_by_role("radio", name=metric).focus()
    page.keyboard.press("Space")
    shapes = schedules(llv.gains(), weights=scale)
    for target in ("0.1", "-2.5"):
        page.locator("[data-role=target]").fill(target)
        goal = float(target) * case["gap"]
        for role, name in {"solve": "optimal", "uniform": "uniform", "first": "layer 0", "last": "last layer"}.items():
            press(page, role)
            inputs = shapes[name] * goal / (llv.gains() @ shapes[name])
            found = check(page, llv, case, scale, inputs)
            assert found["metric"] == metric
            assert found["output"] == pytest.approx(float(target), rel=SAME)
            assert found["ratio"] == pytest.approx(1, rel=SAME) if role == "solve" else found["ratio"] > 1
            reading = page.locator("dd[data-role=energy]").inner_text().replace("\u2212", "-")
            assert float(reading) == pytest.approx(found["energy"], rel=0.006)


def test_sliders_move_by_keyboard_and_change_one_push(page, llv, document):
    case = document["cases"][0]
    press(page, "reset")
    assert not any(check(page, llv, case)["inputs"])
    assert page.locator("dd[data-role=ratio]").inner_text() == "none"
    inputs = np.zeros(llv.n_layers)
    for layer, key, times in ((2, "ArrowUp", 7), (5, "ArrowDown", 3), (0, "ArrowRight", 4), (2, "ArrowLeft", 1)):
        slider = page.get_by_role("slider", name=f"Push before layer {layer}", exact=True)
        slider.focus()
        for _ in range(times):
            page.keyboard.press(key)
        step = float(slider.get_attribute("step"))
        inputs[layer] += times * step * (1 if key in {"ArrowUp", "ArrowRight"} else -1)
        check(page, llv, case, None, inputs)
    page.keyboard.press("End")
    assert (
        shown(page)["inputs"][2]
        == float(page.get_by_role("slider", name="Push before layer 2", exact=True).get_attribute("max"))
        > 0
    )
    reading = page.locator("dd[data-role=energy]").inner_text()
    page.get_by_role("status").filter(has_text=reading).wait_for(state="attached")
    assert page.get_by_role("status").inner_text().startswith("Output shift")


def test_another_model_and_task_bring_their_own_numbers(page, document):
    page.locator("[data-role=model]").select_option("tiny-gpt2 2")
    page.locator("[data-role=task]").select_option("two <b>")
    found, case = shown(page), document["cases"][3]
    assert len(found["inputs"]) == page.locator("input[type=range]").count() == 14
    assert np.allclose(np.array(found["shift"]) * case["gap"], table_of(case) @ found["inputs"], rtol=SAME, atol=SAME)


def test_measured_gains_are_laid_over_the_predicted_ones_on_request(page):
    assert page.locator("svg .mark.measured:visible").count() == 0
    page.get_by_role("checkbox", name="Measured").focus()
    page.keyboard.press("Space")
    assert page.locator("svg .mark.measured:visible").count() == 2  # chart and legend
    assert page.locator("svg .band").count() == 1
    assert page.locator("dd[data-role=measured-output]").is_visible()


def test_a_closer_look_leaves_layer_0_out_of_the_gains_and_nothing_else(page, document):
    before, chart = shown(page), page.locator("figure svg[role=img]").last
    n_points = "svg => svg.querySelector('.mark').getAttribute('d').split('M').length - 1"
    assert chart.evaluate(n_points) == document["cases"][0]["n_layers"] == 7
    page.get_by_role("checkbox", name="Closer").focus()
    page.keyboard.press("Space")
    assert chart.evaluate(n_points) == 6
    assert "from 1 on" in chart.get_attribute("aria-label")
    assert chart.locator("text[text-anchor=middle]").first.text_content() == "1"
    assert shown(page) == before


def test_target_that_is_no_number_is_asked_for(page):
    before = shown(page)
    page.locator("[data-role=target]").fill("")
    page.keyboard.press("Enter")
    assert "Type a target" in page.get_by_role("alert").inner_text()
    assert shown(page) == before


def test_ranges_hold_the_pushes_and_can_be_widened(page):
    slider = page.get_by_role("slider", name="Push before layer 1", exact=True)
    before = float(slider.get_attribute("max"))
    assert before >= max(map(abs, shown(page)["inputs"]))
    inputs = shown(page)["inputs"]
    press(page, "wider")
    assert float(slider.get_attribute("max")) == 2 * before
    assert shown(page)["inputs"] == inputs  # a slider rounds to its step; the pushes do not


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(page, scheme):
    page.evaluate("scheme => document.documentElement.dataset.theme = scheme", scheme)
    page.set_viewport_size({"width": 360, "height": 780})
    page.locator("[data-role=model]").select_option("tiny-gpt2 2")
    page.get_by_role("checkbox", name="Measured").check()
    page.wait_for_function("document.querySelector('.chart svg').viewBox.baseVal.width <= 360")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_page_says_what_it_is_without_javascript(browser, address):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    text = page.locator(".llvlit-explorer").inner_text()
    assert "depth explorer" in text and "JavaScript is off" in text and "{" not in text
    context.close()


def test_script_does_nothing_on_other_pages(browser, tmp_path, address):
    (tmp_path / "page.html").write_text(PAGE.format(element="<p>Other.</p>"), encoding="utf-8")
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(address)
    assert page.locator("main").inner_text().split() == ["Explorer", "Other."]
    assert faults == []
    page.close()
