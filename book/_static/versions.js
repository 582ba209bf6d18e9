// A menu of the published versions. `llvlit publish` writes the version into the copy that it publishes;
// anywhere else, and in a book opened from disk, this does nothing and fetches nothing.
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

  async function start() {
    try {
      const answer = await fetch(new URL("versions.json", site));
      if (answer.ok) show(await answer.json());
    } catch {
      // The menu is an extra: without the list the page is whole.
    }
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
