// A slider over texts that were written in advance: it shows one list of .llvlit-slider at a time.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  for (const [number, element] of document.querySelectorAll(".llvlit-slider").entries()) {
    const lists = [...element.querySelectorAll("dl")];
    const names = lists.map((list) => list.querySelector("dt").textContent);
    const id = `llvlit-slider-${number}`;
    const label = document.createElement("label");
    label.htmlFor = id;
    label.textContent = element.dataset.label;
    const input = document.createElement("input");
    Object.assign(input, { type: "range", id, min: 0, max: lists.length - 1, step: 1 });
    const start = Math.max(0, lists.findIndex((list) => "start" in list.dataset));
    const output = document.createElement("output");
    output.htmlFor = id;
    const show = () => {
      lists.forEach((list, place) => (list.hidden = place !== Number(input.value)));
      output.textContent = names[input.value];
      input.setAttribute("aria-valuetext", names[input.value]);
    };
    input.addEventListener("input", show);
    const head = document.createElement("p");
    head.append(label, input, output);
    element.prepend(head);
    element.classList.add("live");
    const height = () => element.getBoundingClientRect().height;
    const heights = lists.map((_, place) => ((input.value = place), show(), height()));
    element.style.boxSizing = "border-box";
    element.style.minHeight = `${Math.max(...heights)}px`;
    input.value = start;
    show();
  }
});
