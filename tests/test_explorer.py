"""The explorer's document holds the package's and the full model's numbers; its page computes as the package does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import EXACT, tiny_model
from llvlit.engine.depth import depth_system, last_token_states
from llvlit.errors import InputError
from llvlit.method.concepts import concept_directions
from llvlit.method.control import energy, minimum_energy, relative_weights
from llvlit.method.gain_matrix import gain_matrix
from llvlit.method.intervals import mean_interval
from llvlit.method.steering import steer
from llvlit.method.trust import trust_radius
from llvlit.method.verification import output_shifts
from llvlit.prompts import Prompts
from llvlit.publishing.explorer import (
    continuations,
    explorer_html,
    export_explorer,
    preset_shapes,
    shifts_along,
    untrusted,
)
from llvlit.tasks.splits import Splits

STATIC = Path(__file__).resolve().parent.parent / "book" / "_static"
PAGE = """\
<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Explorer</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="explorer.css"><script src="explorer.js"></script></head>
<body><main><h1>Explorer</h1>{element}</main></body></html>
"""
SAME = 1e-9
"""The page computes in float64 from numbers written in full."""

WORDS = ("good", "dull", "nice", "weak", "true", "flat", "warm", "cold")
CONCEPT = Prompts(
    tuple(f"a {word} film" for word in WORDS), (1, 0) * 4
)  # alike before layer 0: its direction is borrowed
SPLITS = Splits(CONCEPT, CONCEPT.select(range(4)), CONCEPT.select(range(3, 8)))
OPENINGS = ["The <b>film", "It was so"]
STRENGTHS = (-2.0, -1.0, 1.0, 2.0)
STORY = [
    {"title": "Everywhere", "preset": "Uniform", "strength": 1.0, "text": "It pushes everywhere."},
    {"title": "Late", "preset": "Late third", "strength": -1.0, "text": "It pushes late."},
    {"title": "In absolute size", "preset": "Absolute optimum", "strength": 2.0, "text": "It pushes early."},
]


@pytest.fixture(scope="module")
def model():
    return tiny_model("gpt2", num_hidden_layers=7)


@pytest.fixture(scope="module")
def directions(model):
    return concept_directions(model, SPLITS.concept)


@pytest.fixture(scope="module")
def document(model, directions):
    found = export_explorer(
        model, SPLITS, directions, openings=OPENINGS, task="film <b>", strengths=STRENGTHS, tokens=4
    )
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def gains(model, directions):
    """Predicted gains, those of borrowed layers zero, and the weights of the relative energy."""
    mean = gain_matrix(model, SPLITS.operating, directions).mean[:, -1]
    weights = relative_weights(last_token_states(model, SPLITS.operating))
    return np.where(np.arange(7) >= directions.first_own, mean, 0), weights


def whole(document, inputs) -> np.ndarray:
    """Inputs of all layers."""
    return np.concatenate([np.zeros(document["first"]), inputs])


def test_every_preset_promises_one_and_leaves_borrowed_layers_alone():
    generator = np.random.default_rng(0)
    h, weights = generator.standard_normal(9), generator.uniform(0.1, 2, 9)
    shapes = preset_shapes(h, weights, first=2)
    for _, shape in shapes.values():
        assert not shape[:2].any() and abs(h @ shape - 1) < EXACT
    own = np.where(np.arange(9) >= 2, h, 0)
    assert np.allclose(shapes["Optimum"][1], minimum_energy(own, 1, weights=weights), rtol=EXACT)
    assert np.allclose(shapes["Absolute optimum"][1], minimum_energy(own, 1), rtol=EXACT)
    for name, layers in {"Uniform": slice(2, None), "Late third": slice(7, None)}.items():
        spent = weights * shapes[name][1] ** 2  # alike in every layer that is pushed
        assert np.allclose(spent[layers], spent[-1], rtol=EXACT) and abs(spent.sum() - spent[layers].sum()) < EXACT
    singles = [energy(each / each[np.newaxis].max(), weights=weights) for each in np.eye(9)]
    cheapest = min(range(2, 9), key=lambda layer: singles[layer] / h[layer] ** 2)
    assert np.flatnonzero(shapes["Best layer"][1]).tolist() == [cheapest]
    with pytest.raises(InputError, match="Last layer"):
        preset_shapes(np.append(h[:-1], 0), weights, first=2)


def test_shifts_along_depth_are_those_of_the_full_model(model, directions, generator):
    system = depth_system(model, SPLITS.evaluation)
    inputs = torch.randn(3, 7, generator=generator, dtype=torch.float64).numpy()
    found = shifts_along(system, directions.on(model), inputs)
    reached = output_shifts(system, directions, np.broadcast_to(inputs, (5, 3, 7)))
    assert np.allclose(found[..., -1], reached, rtol=EXACT, atol=EXACT)
    assert not found[..., 0].any()  # before the first push joins
    up, down = (shifts_along(system, directions.on(model), size * np.eye(7)) for size in (0.1, -0.1))
    matrix = gain_matrix(model, SPLITS.evaluation, directions, amplitude=0.1)
    assert np.allclose((up - down) / 0.2, matrix.per_prompt, atol=1e-10)


def test_document_holds_the_packages_and_the_full_models_numbers(model, directions, document, gains):
    h, weights = gains
    first, gap = document["first"], directions.gaps[-1]
    assert first == directions.first_own == 1 and document["gap"] == gap
    assert np.allclose(1 / np.square(document["norms"]), weights[first:], rtol=EXACT)
    matrix = gain_matrix(model, SPLITS.operating, directions).mean
    for state, row in enumerate(document["response"], start=first + 1):
        assert np.allclose(row, matrix[first:state, state], rtol=EXACT)
    system = depth_system(model, SPLITS.evaluation)
    shapes = preset_shapes(h, weights, first=first)
    assert [preset["name"] for preset in document["presets"]] == list(shapes)
    for preset in document["presets"]:
        inputs = whole(document, preset["inputs"])
        assert np.allclose(inputs, gap * shapes[preset["name"]][1], rtol=EXACT)
        pushed = np.array(STRENGTHS)[:, None] * inputs
        reached = output_shifts(system, directions, np.broadcast_to(pushed, (5, 4, 7))) / gap
        assert np.allclose(preset["measured"], reached.mean(axis=0), rtol=SAME)
        expected = mean_interval(reached, SPLITS.evaluation.pairs, level=0.95, seed=0)
        assert np.allclose([preset["low"], preset["high"]], expected, rtol=SAME)
        assert np.allclose(np.array(preset["along"])[:, -1], preset["measured"], rtol=SAME)
        trust = trust_radius(model, SPLITS.operating, directions, inputs, coverage=0.1)
        assert preset["radius"] == pytest.approx(float(trust.of_mean), rel=1e-6)
        assert preset["untrusted"] == untrusted(STRENGTHS, np.array(preset["measured"]))
    assert document["model_fingerprint"] == model.fingerprint
    assert document["evaluation_fingerprint"] == SPLITS.evaluation.fingerprint


def test_up_to_the_trusted_push_every_preset_keeps_its_promise(document):
    trusted, grid = document["trusted_push"], np.linspace(-2, 2, 401)
    held = []
    for preset in document["presets"]:
        at, reached = [-2, -1, 0, 1, 2], [*preset["measured"][:2], 0, *preset["measured"][2:]]
        off = np.abs(np.interp(grid, at, reached) - grid) > 0.1 * np.abs(grid) + 1e-9
        nearest = np.abs(grid[off]).min(initial=2)
        held.append(nearest * np.abs(np.array(preset["inputs"]) / document["norms"]).max())
    assert trusted == pytest.approx(min(held), rel=1e-6, abs=1e-12)


def test_spans_are_untrusted_where_the_line_through_the_points_leaves_a_tenth_of_the_promise():
    assert untrusted([-2, -1, 1, 2], np.array([-2.1, -1, 1, 1.8])) == []
    assert untrusted([-1, 1, 2], np.array([-0.8, 1, 1])) == [[-1, -0.01], [1.12, 2]]  # 1 / 0.9 is 1.11
    assert untrusted([1, 2], np.array([1.2, 2.1]), tolerance=0.15) == [
        [0.01, 1.19]
    ]  # 1.2 + 0.9 t = 1.15 (1 + t) at t = 0.2


def test_texts_are_what_steering_makes_of_one_push_after_the_other(model, directions, document):
    for preset in document["presets"][:3]:
        for strength, texts in zip(STRENGTHS, preset["texts"], strict=True):
            for opening, text in zip(OPENINGS, texts, strict=True):
                ids = model.tokenizer(opening, return_tensors="pt")
                options = {"max_new_tokens": 4, "do_sample": False, "repetition_penalty": 1.2, "pad_token_id": 0}
                with steer(model, directions, strength * whole(document, preset["inputs"])):
                    new = model.module.generate(**ids, **options)[0, ids["input_ids"].shape[1] :]
                assert text == " ".join(model.tokenizer.decode(new, skip_special_tokens=True).split())
    (plain,) = continuations(model, directions.on(model), np.zeros((1, 7)), OPENINGS, tokens=4)
    assert document["plain"] == plain
    assert any(preset["texts"][-1] != plain for preset in document["presets"])
    assert not any(layer._forward_pre_hooks for layer in model.layers)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"openings": []}, "an opening"),
        ({"strengths": [-1, 0, 1]}, "none of them zero"),
        ({"strengths": [1, -1]}, "rising order"),
    ],
)
def test_export_refuses_what_gives_no_checks(model, directions, options, told):
    with pytest.raises(InputError, match=told):
        export_explorer(model, SPLITS, directions, **{"openings": OPENINGS, "strengths": STRENGTHS, **options})


def test_element_refuses_what_json_and_the_document_cannot_say(document):
    with pytest.raises(InputError, match="cannot be written"):
        explorer_html({**document, "gap": float("nan")})
    with pytest.raises(InputError, match="Uniform"):
        explorer_html(document, story=[{**STORY[0], "strength": 0.7}])


def test_element_holds_the_document_and_no_tag_of_it(document):
    element = explorer_html(document, story=STORY)
    data = json.loads(element.split('<script type="application/json">')[1].split("</script>")[0])
    assert data.pop("story") == STORY
    assert data == document
    assert "<b>" not in element


def test_without_javascript_a_table_says_what_was_measured(document):
    table = explorer_html(document).split("<noscript>")[1].split("</noscript>")[0]
    for preset in document["presets"]:
        row = table.split(f"<td>{preset['name']}</td>")[1].partition("</tr>")[0]
        cells = row.replace("<td>", "").split("</td>")[:-1]
        for strength, value, cell in zip(STRENGTHS, preset["measured"], cells, strict=True):
            assert cell == f"{value:+.2f}" + "*" * (abs(value - strength) > 0.1 * abs(strength))


@pytest.fixture
def address(tmp_path, document):
    for name in ("explorer.js", "explorer.css"):
        (tmp_path / name).write_bytes((STATIC / name).read_bytes())
    (tmp_path / "page.html").write_text(PAGE.format(element=explorer_html(document, story=STORY)), encoding="utf-8")
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
    yield page
    assert faults == []
    context.close()


def shown(page) -> dict:
    """Full-precision numbers of the page."""
    data = page.locator(".llvlit-explorer").evaluate("element => ({...element.dataset})")
    words = {"kind", "preset", "trust", "ready"}
    return {name: value if name in words else json.loads(value) for name, value in data.items()}


def check(page, document, gains, inputs) -> dict:
    """Every number of the page is the package's, for the given pushes of the layers with sliders."""
    found, (h, weights) = shown(page), gains
    weights = weights if found["kind"] == "relative" else None
    assert np.allclose(found["inputs"], inputs, rtol=SAME, atol=SAME)
    inputs = whole(document, inputs)

    def along(each):
        rows = [row @ each[document["first"] :][: len(row)] for row in map(np.array, document["response"])]
        return np.array(rows) / document["gaps"]

    assert np.allclose(found["shift"], along(inputs), rtol=SAME, atol=SAME)
    assert found["output"] * document["gap"] == pytest.approx(h @ inputs, rel=SAME, abs=SAME)
    best = minimum_energy(h, found["output"] * document["gap"], weights=weights)
    assert np.allclose(whole(document, found["best"]), best, rtol=SAME, atol=SAME)
    assert np.allclose(found["bestShift"], along(best), rtol=SAME, atol=SAME)
    assert found["energy"] == pytest.approx(energy(inputs, weights=weights), rel=SAME)
    assert found["optimum"] == pytest.approx(energy(best, weights=weights), rel=SAME)
    assert found["largest"] == pytest.approx(np.abs(inputs * np.sqrt(gains[1])).max(), rel=SAME)
    if inputs.any():
        assert (
            found["ratio"] == pytest.approx(found["energy"] / found["optimum"], rel=SAME) and found["ratio"] > 1 - SAME
        )
    return found


def slider(page, layer):
    return page.get_by_role("slider", name=f"Push before layer {layer}", exact=True)


def preset(page, name):
    return page.get_by_role("button", name=name, exact=True)


def strong(page, document, strength):
    """Move the slider of strengths by keyboard; zero stands in its middle."""
    page.locator("[data-role=strength]").focus()
    page.keyboard.press("Home")
    for _ in range(sorted([*STRENGTHS, 0]).index(strength)):
        page.keyboard.press("ArrowRight")


@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_presets_show_the_packages_and_the_full_models_numbers(page, document, gains, kind):
    page.locator(f"input[value={kind}]").focus()
    page.keyboard.press("Space")
    assert page.locator("[data-role=tale]").inner_text().startswith("A cautionary tale" if kind == "absolute" else "")
    offered = [one for one in document["presets"] if kind in one["energy"]]
    assert page.locator("[data-role=preset]:visible").all_inner_texts() == [one["name"] for one in offered]
    for one in offered:
        preset(page, one["name"]).click()
        for place, strength in enumerate(STRENGTHS):
            strong(page, document, strength)
            found = check(page, document, gains, strength * np.array(one["inputs"]))
            assert found["kind"] == kind and found["preset"] == one["name"]
            assert found["output"] == pytest.approx(strength, rel=SAME)
            assert found["measured"] == [one[name][place] for name in ("measured", "low", "high")]
            off = abs(one["measured"][place] - strength) / abs(strength)
            assert found["trust"] == ("failed" if off > 0.1 else "held")
            assert f"{100 * off:.0f} % off" in page.locator("[data-role=verdict]").inner_text()
            reading = page.locator("dd[data-role=measured]").inner_text().replace("\u2212", "-")
            assert float(reading.split()[0]) == pytest.approx(one["measured"][place], abs=0.0051)
            texts = page.locator("[data-role=texts] dd").all_inner_texts()
            assert all(opening in " ".join(texts) for opening in OPENINGS)


def test_a_push_that_fails_in_the_full_model_says_so(page, document):
    """The old page promised 0.1 where the full model gave 0.000."""
    worst = max(
        ((one, place) for one in document["presets"] if "relative" in one["energy"] for place in range(4)),
        key=lambda each: abs(each[0]["measured"][each[1]] / STRENGTHS[each[1]] - 1),
    )
    preset(page, worst[0]["name"]).click()
    strong(page, document, STRENGTHS[worst[1]])
    assert shown(page)["trust"] == "failed"
    assert page.locator("[data-role=verdict]").inner_text().startswith("The prediction fails here")
    assert page.locator("svg .untrusted").count() == len(worst[0]["untrusted"]) > 0


def test_sliders_move_by_keyboard_and_what_was_not_measured_is_marked(page, document, gains):
    page.locator("[data-role=zero]").click()
    assert not any(check(page, document, gains, np.zeros(6))["inputs"])
    assert page.locator("input[type=range][data-layer]").count() == 6 and not slider(page, 0).count()
    assert "Layer 0 has no direction of its own" in page.locator(".hint").inner_text()
    inputs = np.zeros(6)
    for layer, key, times in ((2, "ArrowUp", 7), (5, "ArrowDown", 3), (2, "ArrowLeft", 1)):
        slider(page, layer).focus()
        for _ in range(times):
            page.keyboard.press(key)
        step = float(slider(page, layer).get_attribute("step")) / 100 * document["norms"][layer - 1]
        inputs[layer - 1] += times * step * (1 if key == "ArrowUp" else -1)
        found = check(page, document, gains, inputs)
        assert found["measured"] is None and not found["preset"]
        assert found["trust"] == ("within" if found["largest"] <= document["trusted_push"] else "unchecked")
    page.keyboard.press("End")
    found = shown(page)
    assert found["inputs"][1] == pytest.approx(float(slider(page, 2).get_attribute("max")) / 100 * document["norms"][1])
    assert found["trust"] == "unchecked" and page.locator("dd[data-role=measured]").inner_text() == "not checked"
    assert page.locator("[data-role=verdict]").inner_text().startswith("Not checked")
    assert page.locator("[data-role=strength]").is_disabled()
    assert "for the presets" in page.locator("[data-role=texts]").inner_text()
    page.get_by_role("status").filter(has_text="Not checked").wait_for(state="attached")


def test_small_pushes_are_within_what_was_checked_with_a_margin_for_every_layer(
    browser, tmp_path, address, document, gains
):
    """Pushes that cancel promise little, and their layers' errors do not cancel."""
    trusting = {**document, "trusted_push": 10.0}
    (tmp_path / "page.html").write_text(PAGE.format(element=explorer_html(trusting)), encoding="utf-8")
    page = browser.new_page()
    page.goto(address)
    page.locator("[data-role=zero]").click()
    for layer, sign in ((2, 1), (4, -1)):  # one up, one down, as seen at the output
        slider(page, layer).focus()
        page.keyboard.press("End" if sign * gains[0][layer] > 0 else "Home")
    found = shown(page)
    parts = np.array(found["inputs"]) * gains[0][1:] / document["gap"]
    assert abs(parts.sum()) < 0.9 * np.abs(parts).sum()
    low, high = parts.sum() - 0.1 * np.abs(parts).sum(), parts.sum() + 0.1 * np.abs(parts).sum()
    words = page.locator("[data-role=verdict]").inner_text().replace("\u2212", "-")
    told = words.partition("moves by ")[2].rstrip(".").split(" to ")
    assert found["trust"] == "within" and np.allclose(list(map(float, told)), [low, high], atol=0.0051)
    page.close()


def test_scales_stay_while_a_slider_moves_and_nothing_is_cut_off_in_silence(page, document):
    texts = "svg => [...svg.querySelectorAll('text')].map(each => each.textContent)"
    axes = lambda: [chart.evaluate(texts) for chart in page.locator("figure svg[role=img]").all()]  # noqa: E731
    page.locator("[data-role=zero]").click()
    before, most = axes(), slider(page, 3).get_attribute("max")
    slider(page, 3).focus()
    page.keyboard.press("End")
    assert axes() == before and slider(page, 3).get_attribute("max") == most
    for strength in STRENGTHS:
        preset(page, "Best layer").click()
        strong(page, document, strength)
        assert slider(page, 3).get_attribute("max") == most
    arrows = page.locator(".track:is([data-push='1'], [data-square='1'])").count()
    assert arrows and "Rescale" in page.locator("[data-role=beyond]").inner_text()
    page.locator("[data-role=rescale]").click()
    assert page.locator("[data-role=beyond]").inner_text() == ""
    relative = 100 * max(np.abs(np.array(shown(page)["inputs"]) / document["norms"]))
    assert relative <= float(slider(page, 3).get_attribute("max")) < 2.6 * relative


def test_zero_is_the_middle_of_a_slider_and_color_begins_there(page):
    page.locator("[data-role=zero]").click()
    read = "track => ['--from', '--to'].map(name => Number(track.style.getPropertyValue(name)))"
    track = page.locator(".track", has=slider(page, 3))
    assert track.evaluate(read) == [0.5, 0.5]
    slider(page, 3).focus()
    page.keyboard.press("PageUp")
    low, high = track.evaluate(read)
    assert low == 0.5 < high
    page.keyboard.press("Home")
    assert track.evaluate(read) == [0, 0.5]


def test_the_story_sets_presets_and_says_its_words(page):
    assert page.locator("[data-role=told]").inner_text() == STORY[0]["text"]  # the page begins with it
    for step, button in zip(STORY, page.locator("[data-role=step]").all(), strict=True):
        button.focus()
        page.keyboard.press("Enter")
        found = shown(page)
        assert (found["preset"], found["output"]) == (step["preset"], pytest.approx(step["strength"]))
        assert found["kind"] == ("absolute" if step["preset"].startswith("Absolute") else "relative")
        assert page.locator("[data-role=told]").inner_text() == step["text"]
        assert button.get_attribute("aria-pressed") == "true"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_phone(page, scheme):
    page.evaluate("scheme => document.documentElement.dataset.theme = scheme", scheme)
    page.set_viewport_size({"width": 360, "height": 780})
    page.wait_for_function("document.querySelector('.chart svg').viewBox.baseVal.width <= 360")
    for kind in ("absolute", "relative"):
        page.locator(f"input[value={kind}]").check()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_page_says_what_it_is_without_javascript(browser, address, document):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(address)
    text = page.locator(".llvlit-explorer").inner_text()
    assert "depth explorer" in text and "JavaScript is off" in text and "{" not in text
    assert page.locator("tbody tr").count() == len(document["presets"])
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
