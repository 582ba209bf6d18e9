// The depth explorer: what a push per layer does along depth, what it costs, and the cheapest push that does the same.
// It looks for .llvlit-explorer with a JSON document inside (llvlit/explorer.py) and does nothing elsewhere.
"use strict";

(() => {
  // ---- Arithmetic: the package's equations, on plain arrays ----

  const dot = (a, b) => a.reduce((sum, value, index) => sum + value * b[index], 0);
  const shifts = (response, inputs) => response.map((row) => dot(row, inputs)); // G u, at every state
  const energy = (weights, inputs) => inputs.reduce((sum, u, layer) => sum + weights[layer] * u * u, 0); // u' W u

  /** Inputs of least energy with h'u = target: target W^-1 h / (h' W^-1 h). */
  function minimumEnergy(gains, weights, target) {
    const along = gains.map((gain, layer) => gain / weights[layer]);
    const reach = dot(gains, along);
    return along.map((value) => (reach > 0 ? (target * value) / reach : 0));
  }

  /** A shape scaled until it reaches the target, or null if it does not move the output. */
  function scaled(gains, shape, target) {
    const reach = dot(gains, shape);
    const size = Math.sqrt(dot(gains, gains) * dot(shape, shape));
    return Math.abs(reach) > 1e-9 * size ? shape.map((value) => (value * target) / reach) : null;
  }

  const shapes = {
    uniform: (weights) => weights.map((weight) => 1 / Math.sqrt(weight)), // alike in energy
    first: (weights) => weights.map((_, layer) => (layer === 0 ? 1 : 0)),
    last: (weights) => weights.map((_, layer) => (layer === weights.length - 1 ? 1 : 0)),
  };

  /** Smallest of 1, 2, 5, 10, ... times a power of ten that is not below a positive value. */
  function roundUp(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    const factor = [1, 2, 5, 10].find((step) => step * power >= value * (1 - 1e-9));
    return Number((factor * power).toPrecision(3));
  }

  /** Three digits for people; full precision stands in the data attributes. */
  function brief(value, digits = 3) {
    if (!Number.isFinite(value)) return "none";
    const size = Math.abs(value);
    let text = "0";
    if (size >= 1e5 || (size > 0 && size < 1e-3)) text = value.toExponential(digits - 1);
    else if (size > 0) text = size >= 100 ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
    return text.replaceAll("-", "\u2212");
  }

  // ---- Elements ----

  /** Element with attributes; a function is a listener, a string a text. */
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

  const MARKS = {
    yours: (x, y) => `M${x - 3.5} ${y}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z`,
    optimum: (x, y) => `M${x - 3.2} ${y - 3.2}h6.4v6.4h-6.4z`,
    predicted: (x, y) => `M${x} ${y - 4}l4 7h-8z`,
    measured: (x, y) => `M${x - 3.2} ${y}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z`,
  };

  function path(points) {
    return points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
  }

  /** Lines over layers or states into an <svg>; a series is {kind, values, low, high}. */
  function chart(svg, series, { x, y, label, first = 0 }) {
    const width = Math.max(svg.parentElement.clientWidth, 240);
    const height = 250;
    const [left, right, top, bottom] = [52, 12, 26, 38];
    const all = series.flatMap((one) => [...one.values, ...(one.low || []), ...(one.high || [])]);
    let [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
    if (high === low) [low, high] = [-1, 1];
    const step = roundUp((high - low) / 5);
    [low, high] = [Math.floor(low / step + 0.05) * step, Math.ceil(high / step - 0.05) * step];
    const count = series[0].values.length;
    const across = (index) => left + (index / Math.max(count - 1, 1)) * (width - left - right);
    const up = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("aria-label", label);
    for (let tick = Math.round(low / step); tick <= Math.round(high / step); tick += 1) {
      const place = up(tick * step);
      draw(svg, "path", { class: tick ? "grid" : "zero", d: `M${left} ${place}H${width - right}` });
      const text = String(Number((tick * step).toPrecision(6))).replace("-", "\u2212");
      draw(svg, "text", { x: left - 6, y: place + 4, "text-anchor": "end" }, text);
    }
    const every = [1, 2, 3, 4, 5, 6, 8, 10, 20].find((gap) => (count - 1) / gap <= (width - left) / 34);
    for (let index = 0; index < count; index += every) {
      draw(svg, "text", { x: across(index), y: height - bottom + 17, "text-anchor": "middle" }, String(first + index));
    }
    draw(svg, "text", { class: "axis", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, x);
    draw(svg, "text", { class: "axis", x: 4, y: 13 }, y);
    for (const one of series) {
      const points = one.values.map((value, index) => [across(index), up(value)]);
      if (one.low) {
        const back = one.low.map((value, index) => [across(index), up(value)]).reverse();
        draw(svg, "path", { class: "band", d: `${path(one.high.map((v, i) => [across(i), up(v)]).concat(back))}z` });
      }
      draw(svg, "path", { class: `line ${one.kind}`, d: path(points) });
      draw(svg, "path", { class: `mark ${one.kind}`, d: points.map(([a, b]) => MARKS[one.kind](a, b)).join("") });
    }
  }

  function legend(names) {
    const list = make("ul", { class: "legend" });
    for (const [kind, name] of Object.entries(names)) {
      const svg = draw(list, "svg", { viewBox: "0 0 30 12", width: 30, height: 12, "aria-hidden": "true" });
      draw(svg, "path", { class: `line ${kind}`, d: "M0 6H30" });
      draw(svg, "path", { class: `mark ${kind}`, d: MARKS[kind](15, 6) });
      list.append(make("li", { "data-kind": kind }, svg, name));
    }
    return list;
  }

  // ---- The page ----

  function mount(root, number) {
    const { cases } = JSON.parse(root.querySelector("script[type='application/json']").textContent);
    const distinct = (key) => [...new Set(cases.map((one) => one[key]))];
    const id = (name) => `llvlit-explorer-${number}-${name}`;
    const state = { inputs: [], range: 1, weights: [], gains: [], one: null, spoken: 0 };

    const select = (key) => {
      const options = distinct(key).map((name) => make("option", { value: name }, name));
      return make("select", { id: id(key), "data-role": key, change: () => choose() }, ...options);
    };
    const models = select("model");
    const tasks = select("task");
    models.value = distinct("model").at(-1);
    const metric = (value, checked) =>
      make(
        "label",
        {},
        make("input", { type: "radio", name: id("metric"), value, checked, change: () => weigh() }),
        ` ${value}`,
      );
    const target = make("input", {
      type: "number", id: id("target"), "data-role": "target", step: "any", value: "0.1", required: true,
      "aria-describedby": id("says"),
    });
    const button = (role, text, click) => make("button", { type: "button", "data-role": role, click }, text);
    const showMeasured = make("input", { type: "checkbox", "data-role": "measured", change: () => render() });
    const skipFirst = make("input", { type: "checkbox", "data-role": "skip", change: () => render() });
    const says = make("p", { class: "says", id: id("says"), role: "alert" });
    const live = make("p", { class: "unseen", role: "status", "aria-live": "polite" });
    const about = make("p", { class: "about" });
    const sliders = make("div", { class: "sliders" });
    const rangeText = make("span", { "data-role": "range" });
    const values = {};
    const reading = (role, text) => {
      values[role] = make("dd", { "data-role": role });
      return make("div", {}, make("dt", {}, text), values[role]);
    };
    const measuredNumber = reading("measured-output", "Output shift by the measured gains");
    const along = draw(make("div", { class: "chart" }), "svg", { role: "img" });
    const gains = draw(make("div", { class: "chart" }), "svg", { role: "img" });
    const gainsLegend = legend({ predicted: "predicted", measured: "measured, with 95 % interval" });

    const form = make(
      "form",
      { submit: (event) => { event.preventDefault(); solve(); }, novalidate: true },
      make("div", { class: "controls" },
        make("div", {}, make("label", { for: models.id }, "Model"), models),
        make("div", {}, make("label", { for: tasks.id }, "Task"), tasks),
        make("fieldset", {}, make("legend", {}, "Energy"), metric("absolute", true), metric("relative", false)),
      ),
      make("div", { class: "controls" },
        make("div", {}, make("label", { for: target.id }, "Target shift, in class gaps"), target),
        make("div", { class: "buttons" },
          make("button", { type: "submit", "data-role": "solve" }, "Solve"),
          button("uniform", "Uniform", () => preset("uniform", "The uniform push")),
          button("first", "Layer 0 only", () => preset("first", "A push at layer 0 alone")),
          button("last", "Last layer only", () => preset("last", "A push at the last layer alone")),
          button("reset", "Reset", () => { say(""); take(state.inputs.map(() => 0)); }),
        ),
      ),
      says,
    );
    root.replaceChildren(
      form,
      make("dl", { class: "numbers" },
        reading("output", "Output shift, in class gaps"),
        reading("energy", "Energy of your push"),
        reading("optimum", "Least energy for this shift"),
        reading("ratio", "Yours over the least"),
        measuredNumber,
      ),
      make("div", { class: "pushes", role: "group", "aria-labelledby": id("pushes") },
        make("div", { class: "controls" },
          make("p", { id: id("pushes"), class: "title" }, "Push before each layer, ", rangeText),
          make("div", { class: "buttons" },
            button("wider", "Wider range", () => widen(2)),
            button("narrower", "Narrower range", () => widen(0.5)),
          ),
        ),
        make("div", { class: "scroll" }, sliders),
        make("p", { class: "hint" }, "A square beside a slider is the optimum's push."),
      ),
      make("figure", {}, along.parentElement, legend({ yours: "your push", optimum: "optimum for the same output shift" })),
      make("figure", {},
        make("div", { class: "controls" },
          make("label", { class: "check" }, showMeasured, " Measured: the full model's gains"),
          make("label", { class: "check" }, skipFirst, " Closer: without layer 0"),
        ),
        gains.parentElement, gainsLegend,
      ),
      about,
      live,
    );

    function say(text) {
      says.textContent = text;
    }

    /** Another model or task: new sliders, and a uniform push to begin with. */
    function choose() {
      const one = cases.find((each) => each.model === models.value && each.task === tasks.value);
      Object.assign(state, { one, gains: one.response.at(-1), inputs: one.norms.map(() => 0) });
      sliders.replaceChildren(
        ...one.norms.map((_, layer) => {
          const input = () => { state.inputs[layer] = slider.valueAsNumber; say(""); render(); };
          const name = `Push before layer ${layer}`;
          const slider = make("input", { type: "range", "data-layer": layer, "aria-label": name, input });
          const track = make("div", { class: "track" }, slider, make("i", { "aria-hidden": "true" }));
          const heading = make("span", { class: "layer", "aria-hidden": "true" }, String(layer));
          return make("div", { class: "slider" }, make("output", { "aria-hidden": "true" }), track, heading);
        }),
      );
      const borrowed = one.borrowed.length ? ` States with a borrowed direction: ${one.borrowed.join(", ")}.` : "";
      about.textContent =
        `${one.model}, ${one.task}: surrogate of order ${one.order} from ${one.n_operating} prompts; class gap at the ` +
        `output ${brief(one.gap)}; measured gains from ${one.n_evaluation} other prompts, relative error of the ` +
        `predicted ones ${brief(one.relative_error, 2)}.${borrowed}`;
      root.dataset.model = one.model;
      root.dataset.task = one.task;
      weigh(false);
      preset("uniform", "The uniform push");
    }

    /** Another kind of energy: the pushes stay, their price and the optimum change. */
    function weigh(show = true) {
      const relative = root.querySelector("input[type=radio]:checked").value === "relative";
      state.weights = state.one.norms.map((norm) => (relative ? 1 / (norm * norm) : 1));
      root.dataset.metric = relative ? "relative" : "absolute";
      if (show) render();
    }

    /** The target in output units, or null with a word to the reader. */
    function wanted() {
      if (target.value.trim() === "" || !Number.isFinite(target.valueAsNumber)) {
        say("Type a target first: a number of class gaps, such as 0.1.");
        target.focus();
        return null;
      }
      say("");
      return target.valueAsNumber * state.one.gap;
    }

    function solve() {
      const goal = wanted();
      if (goal !== null) take(minimumEnergy(state.gains, state.weights, goal));
    }

    function preset(name, words) {
      const goal = wanted();
      if (goal === null) return render();
      const inputs = scaled(state.gains, shapes[name](state.weights), goal);
      if (inputs) take(inputs);
      else say(`${words} does not move the output of this surrogate: no target is in its reach.`);
    }

    /** Take pushes from a solver: exact values, and a range that holds them. */
    function take(inputs) {
      state.inputs = inputs;
      const best = minimumEnergy(state.gains, state.weights, dot(state.gains, inputs));
      const largest = Math.max(...inputs.map(Math.abs), ...best.map(Math.abs));
      if (largest > 0) state.range = roundUp(1.2 * largest);
      place();
    }

    function widen(factor) {
      const largest = Math.max(...state.inputs.map(Math.abs));
      if (factor > 1 || largest <= factor * state.range) state.range *= factor;
      else say("A push is larger than that.");
      place();
    }

    /** Sliders to the pushes; render() alone never moves them, since a slider rounds to its step. */
    function place() {
      rangeText.textContent = `from ${brief(-state.range)} to ${brief(state.range)}`;
      sliders.querySelectorAll("input").forEach((slider, layer) => {
        Object.assign(slider, { min: -state.range, max: state.range, step: state.range / 100 });
        slider.value = state.inputs[layer];
      });
      render();
    }

    function render() {
      const { one, inputs, weights } = state;
      const shift = shifts(one.response, inputs);
      const best = minimumEnergy(state.gains, weights, shift.at(-1));
      const bestShift = shifts(one.response, best);
      const spent = energy(weights, inputs);
      const least = energy(weights, best);
      const ratio = least > 0 ? spent / least : NaN;
      const output = shift.at(-1) / one.gap;
      const measuredOutput = dot(one.measured, inputs) / one.gap;
      const exact = {
        inputs, best, output, energy: spent, optimum: least, ratio, measuredOutput,
        shift: shift.map((value) => value / one.gap), bestShift: bestShift.map((value) => value / one.gap),
      };
      for (const [name, value] of Object.entries(exact)) root.dataset[name] = JSON.stringify(value);
      values.output.textContent = brief(output);
      values.energy.textContent = brief(spent);
      values.optimum.textContent = brief(least);
      values.ratio.textContent = Number.isFinite(ratio) ? `${brief(ratio)} times` : "none";
      values["measured-output"].textContent = brief(measuredOutput);
      measuredNumber.hidden = !showMeasured.checked;
      gainsLegend.querySelector("[data-kind=measured]").hidden = !showMeasured.checked;
      sliders.querySelectorAll(".slider").forEach((column, layer) => {
        column.querySelector("output").textContent = brief(inputs[layer], 2);
        const words = `${brief(inputs[layer])}, optimum ${brief(best[layer])}`;
        column.querySelector("input").setAttribute("aria-valuetext", words);
        const part = Math.min(1, Math.max(0, (best[layer] / state.range + 1) / 2));
        column.querySelector("i").style.setProperty("--part", part);
      });
      const sentence =
        `Output shift ${brief(output)} class gaps. Energy (${root.dataset.metric}) ${brief(spent)}, ` +
        `least ${brief(least)}${Number.isFinite(ratio) ? `: ${brief(ratio)} times the least` : ""}.`;
      chart(along, [{ kind: "yours", values: exact.shift }, { kind: "optimum", values: exact.bestShift }], {
        x: "State (before layer)", y: "Predicted shift along the concept (class gaps)",
        label: `Predicted concept shift at every state, of your push and of the optimum. ${sentence}`,
      });
      const first = skipFirst.checked ? 1 : 0;
      const [predicted, measured, low, high] =
        [state.gains, one.measured, one.low, one.high].map((values) => values.slice(first));
      const lines = [{ kind: "predicted", values: predicted }];
      if (showMeasured.checked) lines.unshift({ kind: "measured", values: measured, low, high });
      chart(gains, lines, {
        x: "Layer", y: "Gain (output per input)", first,
        label: `Gain of each layer${first ? " from 1 on" : ""}: ${lines.map((line) => line.kind).join(" and ")}.`,
      });
      clearTimeout(state.spoken); // speak when the reader rests, not at every step of a drag
      state.spoken = setTimeout(() => { live.textContent = sentence; }, 400);
    }

    choose();
    new ResizeObserver(() => render()).observe(along.parentElement);
    root.dataset.ready = "";
  }

  const start = () => document.querySelectorAll(".llvlit-explorer").forEach(mount);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
