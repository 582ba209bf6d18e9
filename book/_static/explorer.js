// The depth explorer: what a push per layer does along depth, what it costs, and what the full model did with it.
// It looks for .llvlit-explorer with a JSON document inside (llvlit/publishing/explorer.py) and does nothing elsewhere.
"use strict";

(() => {
  // ---- Arithmetic: the package's equations, on plain arrays of the layers that have sliders ----

  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const energy = (weights, inputs) => inputs.reduce((sum, u, layer) => sum + weights[layer] * u * u, 0); // u' W u

  /** Inputs of least energy with h'u = target: target W^-1 h / (h' W^-1 h). */
  function minimumEnergy(gains, weights, target) {
    const along = gains.map((gain, layer) => gain / weights[layer]);
    const reach = dot(gains, along);
    return along.map((value) => (reach > 0 ? (target * value) / reach : 0));
  }

  /** Predicted shift at every later state, in class gaps of that state; each row knows the layers before it. */
  const shifts = ({ response, gaps }, inputs) => response.map((row, state) => dot(row, inputs) / gaps[state]);

  const largestOf = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

  /** Smallest of 1, 2, 5, 10, ... times a power of ten that is not below a positive value. */
  function roundUp(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    const factor = [1, 2, 5, 10].find((step) => step * power >= value * (1 - 1e-9));
    return Number((factor * power).toPrecision(3));
  }

  /** Some digits for people; full precision stands in the data attributes. */
  function brief(value, digits = 3) {
    if (!Number.isFinite(value)) return "none";
    const size = Math.abs(value);
    let text = "0";
    if (size >= 1e5 || (size > 0 && size < 1e-3)) text = value.toExponential(digits - 1);
    else if (size > 0) text = size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
    return text.replaceAll("-", "\u2212");
  }

  /** Class gaps, or any number with two decimals. */
  const gapsOf = (value) => (Math.abs(value) < 0.005 ? "0.00" : value.toFixed(2).replace("-", "\u2212"));

  // ---- Elements ----

  /** Element with attributes; a function is a listener. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name, value);
      else if (value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  }

  function draw(parent, tag, attributes, text = "") {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.textContent = text;
    parent.append(element);
    return element;
  }

  const line = (points) => points.map(([x, y], at) => `${at ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");

  function ticks([low, high], most, least = 0) {
    const step = Math.max(least, roundUp((high - low) / most));
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at <= high / step + 1e-9; at += 1) found.push(at * step);
    return found;
  }

  /** Axes of fixed scales; what is drawn into .area is cut off at its edges. */
  function frame(svg, { xs, ys, x, y, label, least = 0 }) {
    const width = Math.max(svg.parentElement.clientWidth, 240);
    const height = 270;
    const [left, right, top, bottom] = [46, 12, 26, 40];
    const across = (value) => left + ((value - xs[0]) / (xs[1] - xs[0])) * (width - left - right);
    const up = (value) => top + ((ys[1] - value) / (ys[1] - ys[0])) * (height - top - bottom);
    const written = (value) => String(Number(value.toPrecision(6))).replace("-", "\u2212");
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", label);
    for (const tick of ticks(ys, 6)) {
      draw(svg, "path", { class: tick ? "grid" : "zero", d: `M${left} ${up(tick)}H${width - right}` });
      draw(svg, "text", { x: left - 6, y: up(tick) + 4, "text-anchor": "end" }, written(tick));
    }
    for (const tick of ticks(xs, (width - left - right) / 42, least)) {
      const place = { x: across(tick), y: height - bottom + 18, "text-anchor": "middle" };
      draw(svg, "text", place, written(tick));
    }
    draw(svg, "text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, x);
    draw(svg, "text", { x: 4, y: 13 }, y);
    const box = [left - 5, top - 5, width - left - right + 10, height - top - bottom + 10];
    const area = draw(svg, "svg", { x: box[0], y: box[1], width: box[2], height: box[3], viewBox: box.join(" ") });
    return { area, across, up, top, bottom: height - bottom };
  }

  // ---- The page ----

  function mount(root, number) {
    const data = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const { presets, first, norms, gap, tolerance, trusted_push: trusted, story } = data;
    const gains = data.response.at(-1);
    const steps = [...data.strengths, 0].sort((a, b) => a - b);
    const usual = data.strengths.find((value) => value >= 1) ?? data.strengths.at(-1);
    const last = first + norms.length - 1;
    const id = (name) => `llvlit-explorer-${number}-${name}`;
    const percent = (inputs) => inputs.map((input, at) => (100 * input) / norms[at]);
    const range = (most) => roundUp(Math.max(most, 1e-6));
    const state = {
      kind: "relative", preset: null, strength: 0, step: null, inputs: norms.map(() => 0), spoken: 0,
      push: range(1.2 * largestOf(percent(presets[0].inputs))),
      depth: range(largestOf(presets.filter((one) => one.energy.includes("relative")).flatMap((one) => one.along.flat())) / 2),
    };
    // The scale of the first chart holds every preset at every strength, once and for all.
    const seen = [...data.strengths, ...presets.flatMap((one) => [...one.low, ...one.high])];
    const answers = [Math.min(...seen), Math.max(...seen)];

    const button = (role, text, click) => make("button", { type: "button", "data-role": role, click }, text);
    const kind = (value, words) =>
      make(
        "label",
        {},
        make("input", { type: "radio", name: id("kind"), value, checked: value === "relative", change: () => weigh(value) }),
        ` ${words}`,
      );
    const tale = make("p", { class: "tale", "data-role": "tale" });
    const told = make("p", { class: "told", "data-role": "told" });
    const chapters = story.map((one, at) => button("step", `${at + 1}. ${one.title}`, () => follow(at)));
    const choices = presets.map((one) => button("preset", one.name, () => choose(one, state.strength || usual)));
    const strength = make("input", {
      type: "range", id: id("strength"), "data-role": "strength", min: 0, max: steps.length - 1, step: 1,
      input: () => choose(state.preset, steps[strength.valueAsNumber]),
    });
    const strengthTrack = make("div", { class: "track flat" }, make("b"), strength);
    const strengthText = make("output", { for: strength.id });
    const verdict = make("p", { class: "verdict", "data-role": "verdict" });
    const live = make("p", { class: "unseen", role: "status", "aria-live": "polite" });
    const beyond = make("p", { class: "beyond", "data-role": "beyond" });
    const texts = make("div", { class: "texts", "data-role": "texts" });
    const values = {};
    const reading = (role, text) => {
      values[role] = make("dd", { "data-role": role });
      return make("div", {}, make("dt", {}, text), values[role]);
    };
    const tracks = norms.map((_, at) => {
      const input = () => {
        state.inputs[at] = (slider.valueAsNumber / 100) * norms[at];
        state.preset = null;
        render();
      };
      const slider = make("input", {
        type: "range", "data-layer": first + at, "aria-label": `Push before layer ${first + at}`, input,
      });
      return { slider, track: make("div", { class: "track" }, make("b"), slider, make("i", { "aria-hidden": "true" })),
        output: make("output", { "aria-hidden": "true" }) };
    });
    const answer = draw(make("div", { class: "chart" }), "svg", { role: "img" });
    const along = draw(make("div", { class: "chart" }), "svg", { role: "img" });
    const borrowed = first === 0 ? "" : ` ${first === 1 ? "Layer 0 has" : `Layers 0 to ${first - 1} have`} no ` +
      `direction of ${first === 1 ? "its" : "their"} own and ${first === 1 ? "is" : "are"} left alone.`;

    root.replaceChildren(
      make("div", { class: "story", role: "group", "aria-label": "A story in steps", hidden: !story.length }, make("div", { class: "buttons" }, ...chapters), told),
      make("div", { class: "controls" },
        make("fieldset", {}, make("legend", {}, "Energy"), kind("relative", "relative"),
          kind("absolute", "absolute, a cautionary tale")),
        make("div", {}, make("p", { class: "name", id: id("presets") }, "Preset"),
          make("div", { class: "buttons", role: "group", "aria-labelledby": id("presets") }, ...choices)),
      ),
      tale,
      make("div", { class: "strength" }, make("label", { for: strength.id }, "Strength: the output shift that a preset promises"),
        strengthTrack, strengthText),
      make("div", { class: "pushes", role: "group", "aria-labelledby": id("pushes") },
        make("div", { class: "controls" },
          make("p", { id: id("pushes"), class: "title" }, "Push before each layer, in % of its state"),
          make("div", { class: "buttons" }, button("zero", "All to zero", () => zero()), button("rescale", "Rescale", () => rescale())),
        ),
        make("div", { class: "scroll" }, make("div", { class: "sliders" }, ...tracks.map(({ output, track }, at) =>
          make("div", { class: "slider" }, output, track,
            make("span", { class: "layer", "aria-hidden": "true" }, String(first + at)))))),
        make("p", { class: "hint" }, `A square marks the cheapest push for the same promise.${borrowed}`),
        beyond,
      ),
      verdict,
      make("dl", { class: "numbers" },
        reading("output", "Promised output shift, in class gaps"),
        reading("measured", `Measured, full model, ${data.n_evaluation} held-out prompts`),
        reading("energy", "Energy of your push"),
        reading("ratio", "Over the least for this promise"),
        reading("largest", "Largest push, of its state"),
      ),
      make("figure", {}, answer.parentElement,
        make("figcaption", {}, `Dashed: promised. Solid: measured, with its 95 % interval. Shaded: off by more than ` +
          `${100 * tolerance} % of the promise. Triangles: where the trust radius foretold that.`)),
      make("figure", {}, along.parentElement,
        make("figcaption", {}, "The concept along depth, in class gaps of each state. Dashed: predicted. Solid: measured, for a preset. " +
          "Dotted: the cheapest push for the same promise, predicted.")),
      texts,
      make("p", { class: "about" }, `${data.model}${data.task && `, ${data.task}`}: predictions from ${data.n_operating} ` +
        `prompts, checks at ${data.n_evaluation} others; a class gap at the output is ${brief(gap)}.`),
      live,
    );

    /** A step of the story: its words, its preset and strength. */
    function follow(at) {
      const one = story[at];
      const preset = presets.find((each) => each.name === one.preset);
      state.step = at;
      if (!preset.energy.includes(state.kind)) weigh(preset.energy[0], false);
      choose(preset, one.strength);
    }

    function choose(preset, size) {
      Object.assign(state, { preset, strength: size, inputs: preset.inputs.map((input) => input * size) });
      place();
    }

    function zero() {
      Object.assign(state, { preset: null, inputs: norms.map(() => 0) });
      place();
    }

    /** Another kind of energy: its presets, its price and its optimum. */
    function weigh(value, show = true) {
      state.kind = value;
      root.querySelector(`input[type=radio][value=${value}]`).checked = true;
      if (!show) return;
      if (state.preset && !state.preset.energy.includes(value)) {
        choose(presets.find((each) => each.energy.includes(value)), state.strength);
      } else render();
    }

    const best = (target) => minimumEnergy(gains, weights(), target);
    const weights = () => norms.map((norm) => (state.kind === "relative" ? 1 / (norm * norm) : 1));

    /** Scales that hold what is shown; nothing else changes them. */
    function rescale() {
      const cheapest = best(dot(gains, state.inputs));
      state.push = range(Math.max(largestOf(percent(state.inputs)), largestOf(percent(cheapest))));
      const lines = [shifts(data, state.inputs), shifts(data, cheapest), measured()?.along ?? []];
      state.depth = range(largestOf(lines.flat()));
      place();
    }

    /** Sliders to the pushes; render() alone never moves them, since a slider rounds to its step. */
    function place() {
      percent(state.inputs).forEach((value, at) => {
        Object.assign(tracks[at].slider, { min: -state.push, max: state.push, step: state.push / 100 });
        tracks[at].slider.value = value;
      });
      render();
    }

    /** What the full model did with the preset that is shown, or null. */
    function measured() {
      if (!state.inputs.some((input) => input !== 0)) {
        return { mean: 0, low: 0, high: 0, along: data.gaps.map(() => 0), texts: data.plain };
      }
      if (!state.preset) return null;
      const at = data.strengths.indexOf(state.strength);
      const { measured: mean, low, high, along: path, texts: written } = state.preset;
      return { mean: mean[at], low: low[at], high: high[at], along: path[at], texts: written[at] };
    }

    /** Whether to trust the promise, and why, in words. */
    function judge(output, found, largest, layer) {
      const size = `${brief(100 * largest)} % of its state, before layer ${layer}`;
      if (largest === 0) return ["zero", "No push, no shift."];
      if (found) {
        const off = Math.abs(found.mean - output) / Math.abs(output);
        const words = `promised ${gapsOf(output)} class gaps, measured ${gapsOf(found.mean)}`;
        return off > tolerance
          ? ["failed", `The prediction fails here: ${words}, which is ${(100 * off).toFixed(0)} % off.`]
          : ["held", `Checked on the full model: ${words}, ${(100 * off).toFixed(0)} % off.`];
      }
      if (largest > trusted) {
        return ["unchecked", `Not checked. Your largest push is ${size}; up to ${brief(100 * trusted)} % every preset kept its ` +
          `promise, and this is ${brief(largest / trusted, 2)} times as much. Do not trust the numbers.`];
      }
      const give = (tolerance * gains.reduce((sum, gain, at) => sum + Math.abs(gain * state.inputs[at]), 0)) / gap;
      return ["within", `Not measured, but within what was checked: your largest push is ${size}, and every preset kept its promise ` +
        `up to ${brief(100 * trusted)} %. If each layer keeps its own to ${100 * tolerance} %, the output moves by ` +
        `${gapsOf(output - give)} to ${gapsOf(output + give)}.`];
    }

    function render() {
      const { inputs, preset } = state;
      const shift = shifts(data, inputs);
      const output = shift.at(-1);
      const cheapest = best(output * gap);
      const bestShift = shifts(data, cheapest);
      const [spent, least] = [energy(weights(), inputs), energy(weights(), cheapest)];
      const ratio = least > 0 ? spent / least : NaN;
      const found = measured();
      const relative = percent(inputs).map(Math.abs);
      const largest = largestOf(relative) / 100;
      const [trust, words] = judge(output, found, largest, first + relative.indexOf(100 * largest));
      const exact = { inputs, best: cheapest, output, energy: spent, optimum: least, ratio, largest, shift, bestShift,
        measured: found && [found.mean, found.low, found.high] };
      for (const [name, value] of Object.entries(exact)) root.dataset[name] = JSON.stringify(value);
      Object.assign(root.dataset, { kind: state.kind, preset: preset?.name ?? "", trust });

      chapters.forEach((one, at) => one.setAttribute("aria-pressed", at === state.step));
      told.textContent = state.step === null ? "" : story[state.step].text;
      choices.forEach((one, at) => {
        one.hidden = !presets[at].energy.includes(state.kind);
        one.setAttribute("aria-pressed", presets[at] === preset);
      });
      tale.textContent = state.kind === "relative" ? "" : "A cautionary tale. Absolute energy charges a push of length one alike " +
        `everywhere, but that is ${brief(100 / norms[0], 2)} % of the state before layer ${first} and ` +
        `${brief(100 / norms.at(-1), 2)} % before layer ${last}. So its optimum spends where states are short, and leaves ` +
        "the range in which gains hold. Watch the shaded part.";
      strength.disabled = !preset;
      if (preset) strength.value = steps.indexOf(state.strength);
      const middle = steps.indexOf(0) / (steps.length - 1);
      fill(strengthTrack, preset ? strength.value / (steps.length - 1) : middle, middle);
      strengthText.textContent = preset ? `${gapsOf(state.strength)} class gaps` : "your own push: choose a preset to set a strength";
      strength.setAttribute("aria-valuetext", strengthText.textContent);
      verdict.textContent = words;
      const interval = found && found.low !== found.high ? ` (${gapsOf(found.low)} to ${gapsOf(found.high)})` : "";
      values.output.textContent = gapsOf(output);
      values.measured.textContent = found ? gapsOf(found.mean) + interval : trust === "within" ? "not measured" : "not checked";
      values.energy.textContent = `${brief(spent)}, ${state.kind}`;
      values.ratio.textContent = Number.isFinite(ratio) ? `${brief(ratio)} times` : "none";
      values.largest.textContent = `${brief(100 * largest)} %`;

      let hidden = false;
      tracks.forEach(({ slider, track, output: text }, at) => {
        const [value, wanted] = [percent(inputs)[at], percent(cheapest)[at]];
        text.textContent = brief(value, 2);
        slider.setAttribute("aria-valuetext", `${brief(value)} % of the state, cheapest ${brief(wanted)} %`);
        fill(track, (value / state.push + 1) / 2, 0.5);
        const out = (one) => (Math.abs(one) > state.push * (1 + 1e-9) ? Math.sign(one) : 0);
        track.style.setProperty("--square", Math.min(1, Math.max(0, (wanted / state.push + 1) / 2)));
        track.dataset.push = out(value);
        track.dataset.square = out(wanted);
        hidden ||= out(value) !== 0 || out(wanted) !== 0;
      });
      const lines = { predicted: shift, cheapest: bestShift, ...(found && { measured: found.along }) };
      hidden ||= largestOf(Object.values(lines).flat()) > state.depth * (1 + 1e-9);
      beyond.textContent = hidden ? "Something lies beyond the scales (an arrow instead of a square or a handle, a line cut off): Rescale shows it." : "";
      drawAnswer(output, found);
      drawAlong(lines);
      showTexts(found);
      clearTimeout(state.spoken); // speak when the reader rests, not at every step of a drag
      state.spoken = setTimeout(() => { live.textContent = words; }, 400);
    }

    /** The colored part of a slider, from zero to where its handle is. */
    function fill(track, part, zeroAt) {
      const inside = Math.min(1, Math.max(0, part));
      track.style.setProperty("--from", Math.min(inside, zeroAt));
      track.style.setProperty("--to", Math.max(inside, zeroAt));
    }

    function drawAnswer(output, found) {
      const { preset } = state;
      const [low, high] = [data.strengths[0], data.strengths.at(-1)];
      const spans = (preset?.untrusted ?? []).map((span) => span.map(gapsOf).join(" to "));
      const { area, across, up, top, bottom } = frame(answer, {
        xs: [Math.min(low, 0), Math.max(high, 0)], ys: answers, x: "Promised output shift (class gaps)", y: "Output shift (class gaps)",
        label: preset ? `Measured against promised output shift of the preset ${preset.name}. Not to be trusted: ${spans.join(", ") || "nowhere"}.`
          : "Promised output shift; nothing is measured for your own push.",
      });
      for (const [from, to] of preset?.untrusted ?? []) {
        draw(area, "rect", { class: "untrusted", x: across(from), y: top, width: across(to) - across(from), height: bottom - top });
      }
      const ends = [Math.max(low, answers[0]), Math.min(high, answers[1])];
      draw(area, "path", { class: "line predicted", d: line(ends.map((value) => [across(value), up(value)])) });
      const label = (x, y, anchor, name, shown) => draw(area, "text", { class: name, x, y, "text-anchor": anchor }, shown);
      label(across(0.6 * high) - 10, up(0.6 * high), "end", "predicted", "promised");
      if (preset) {
        const at = [...data.strengths, 0].map((value, place) => [value, place]).sort((a, b) => a[0] - b[0]);
        const points = (name) => at.map(([value, place]) => [across(value), up(place < data.strengths.length ? preset[name][place] : 0)]);
        draw(area, "path", { class: "band", d: `${line([...points("high"), ...points("low").reverse()])}z` });
        draw(area, "path", { class: "line measured", d: line(points("measured")) });
        const [x, y] = points("measured").at(-1);
        label(x - 2, y + (preset.measured.at(-1) < high ? 20 : -10), "end", "measured", "measured");
        for (const side of preset.radius === null ? [] : [-1, 1]) {
          draw(area, "path", { class: "radius", d: `M${across(side * preset.radius)} ${bottom - 9}l5 9h-10z` });
        }
      }
      const place = { cx: across(output), cy: up(found ? found.mean : output), r: 5.5 };
      draw(area, "circle", { class: found ? "here" : "here open", ...place });
    }

    function drawAlong(lines) {
      const { area, across, up } = frame(along, {
        xs: [first + 1, data.n_layers], ys: [-state.depth, state.depth], x: "State (before layer)", y: "Shift (class gaps of the state)",
        least: 1, label: `Shift of the concept at every state, ${Object.keys(lines).join(", ")}; at the output ` +
          `${Object.entries(lines).map(([name, values]) => `${name} ${gapsOf(values.at(-1))}`).join(", ")}.`,
      });
      for (const [name, values] of Object.entries(lines)) {
        const points = values.map((value, at) => [across(first + 1 + at), up(value)]);
        draw(area, "path", { class: `line ${name}`, d: line(points) });
      }
    }

    function showTexts(found) {
      const pushed = found ? found.texts : null;
      texts.replaceChildren(
        make("p", { class: "title" }, "What it writes, without a push and with yours at every new word"),
        ...(pushed
          ? data.openings.map((opening, at) => make("dl", {},
            ...[["No push", data.plain[at]], ["Pushed", pushed[at]]].map(([name, text]) =>
              make("div", {}, make("dt", {}, name), make("dd", {}, make("span", {}, `${opening} `), `${text} \u2026`)))))
          : [make("p", {}, "These texts were written in advance, for the presets. Choose one to read what it does.")]),
      );
    }

    if (story.length) follow(0);
    else choose(presets[0], usual);
    new ResizeObserver(() => render()).observe(answer.parentElement);
    root.dataset.ready = "";
  }

  const start = () => document.querySelectorAll(".llvlit-explorer").forEach(mount);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
