// What is wider than its place scrolls sideways; here the keyboard can reach and move it, too.
"use strict";

(() => {
  const WIDE =
    ".bd-content :is(aside, div.math, mjx-container, pre, .cell_output, .output, .pst-scrollable-table-container)";

  function update() {
    for (const element of document.querySelectorAll(WIDE)) {
      const scrolls = /auto|scroll/.test(getComputedStyle(element).overflowX);
      if (scrolls && element.scrollWidth > element.clientWidth) element.setAttribute("tabindex", "0");
      else element.removeAttribute("tabindex");
    }
  }

  window.addEventListener("load", async () => {
    await window.MathJax?.startup?.promise;
    update();
    const article = document.querySelector(".bd-article");
    if (article) new ResizeObserver(update).observe(article); // another width, or a solution opened
  });
})();
