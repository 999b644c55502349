(() => {
  "use strict";
  const fresh = (selector) =>
    [...document.querySelectorAll(selector)].filter((el) => !el.dataset.ready && (el.dataset.ready = "1"));

  // circuitsvis renders by id, so every root gets one here.
  window.metaoptLensRoots = window.metaoptLensRoots || 0;
  for (const root of fresh(".ml-cv")) {
    root.id = `ml-cv-${window.metaoptLensRoots++}`;
    CircuitsVis.render(root.id, CircuitsVis[root.dataset.element], JSON.parse(root.dataset.props));
  }

  // Plots drawn while the page was still being read may have had another width.
  const refit = () => document.querySelectorAll(".js-plotly-plot").forEach((plot) => Plotly.Plots.resize(plot));
  window.addEventListener("beforeprint", refit);
  refit();

  for (const tabs of fresh(".ml-tabs")) {
    const card = tabs.closest(".ml-card");
    tabs.addEventListener("click", (event) => {
      const chosen = event.target.closest("button");
      if (!chosen) return;
      for (const button of tabs.querySelectorAll("button"))
        button.setAttribute("aria-pressed", String(button === chosen));
      for (const panel of card.querySelectorAll(".ml-panel"))
        panel.hidden = panel.dataset.panel !== chosen.dataset.panel;
    });
  }

  for (const table of fresh("table.ml-sortable")) {
    const key = (row, column) => {
      const cell = row.cells[column];
      const text = cell.dataset.order ?? cell.textContent;
      if (text === "-inf") return -Infinity; // no value
      return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
    };
    for (const header of table.tHead.rows[0].cells)
      header.addEventListener("click", () => {
        const column = header.cellIndex;
        const down = header.getAttribute("aria-sort") !== "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a, column), key(b, column)];
          return (x < y ? -1 : x > y ? 1 : 0) * (down ? -1 : 1);
        });
        table.tBodies[0].append(...rows);
      });
  }
})();
