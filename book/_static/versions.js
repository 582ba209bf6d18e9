// A menu of the published versions, and the newest daily builds on the status page. `llvlit publish` writes the
// version into the copy that it publishes; anywhere else, and in a book opened from disk, this fetches nothing.
"use strict";

(() => {
  const version = "";
  if (!version || !location.protocol.startsWith("http")) return;

  const base = new URL("../", document.currentScript.src); // the folder of this version
  const site = new URL("../", base);

  async function open(url) {
    const page = new URL(location.pathname.slice(base.pathname.length), new URL(url, site));
    const found = await fetch(page, { method: "HEAD" }).then((answer) => answer.ok, () => false);
    location.assign(found ? page : new URL(url, site));
  }

  function menu(versions) {
    const select = document.createElement("select");
    select.className = "versions form-select form-select-sm";
    select.setAttribute("aria-label", "Version of the book");
    for (const known of versions) {
      const name = known.preferred && known.version !== "latest" ? `${known.version} (stable)` : known.version;
      select.add(new Option(name, known.url, false, known.version === version));
    }
    select.addEventListener("change", () => open(select.value));
    return select;
  }

  function show(versions) {
    const box = document.createElement("div");
    box.className = "sidebar-primary-item versions-box";
    box.append(menu(versions));
    if (versions.some((known) => known.version === version && known.pdf)) {
      const link = document.createElement("a");
      link.href = new URL("llvlit.pdf", base);
      link.textContent = "PDF";
      link.setAttribute("aria-label", "The whole book as PDF");
      box.append(link);
    }
    const title = document.querySelector(".sidebar-primary-items__start .sidebar-primary-item");
    if (title) title.after(box);
    else document.body.prepend(box);
  }

  function tell(runs) {
    const rows = runs.map((run) => {
      const row = document.createElement("tr");
      for (const field of ["versions", "outcome", "date", "commit", "python", "torch", "transformers"]) {
        row.insertCell().textContent = run[field];
      }
      return row;
    });
    if (rows.length) document.querySelector(".daily-runs tbody").replaceChildren(...rows);
  }

  async function take(name, use) {
    try {
      const answer = await fetch(new URL(name, site), { cache: "no-cache" });
      if (answer.ok) use(await answer.json());
    } catch {
      // Both are extras: without them the page is whole.
    }
  }

  function start() {
    take("versions.json", show);
    if (document.querySelector(".daily-runs")) take("runs.json", tell);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
