(() => {
  "use strict";
  const fresh = (selector, within = document) =>
    [...within.querySelectorAll(selector)].filter((el) => !el.dataset.ready && (el.dataset.ready = "1"));

  // ---- libraries: text in the page until something needs them ------------------------------------------------------

  const need = (name) => {
    const text = document.querySelector(`script[data-library="${name}"]:not([data-ready])`);
    if (!text) return;
    text.dataset.ready = "1";
    const script = document.createElement("script");
    script.textContent = text.textContent;
    document.head.append(script);
  };

  // ---- figures, in the reader's colours ------------------------------------------------------------------------

  const LIGHT = { ink: "#1f2933", grid: "#dde3e9", zero: "#52606d", plot: "#f3f5f8", box: "#ffffff" };
  const DARK = { ink: "#dfe5eb", grid: "#333d47", zero: "#8a96a3", plot: "#1d242b", box: "#1d242b" };
  const COLOURS = ["#1f5fa8", "#d1495b", "#c98a12", "#4d8f6b", "#8d6a9f", "#7f8c8d", "#b08968"];
  const BRIGHT = ["#6aa9f0", "#ff8f9c", "#f0c05a", "#7fd0a0", "#c3a0d8", "#a9b4bd", "#d9b38c"];
  // Where light scales go to white, these go to the page.
  const SIGNED = [[0, "#ff9d7a"], [0.5, "#1d242b"], [1, "#7ab6ff"]];
  const SIZES = [[0, "#1d242b"], [1, "#7ab6ff"]];
  const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
  const OPTIONS = { displaylogo: false, displayModeBar: false, responsive: true };

  const brighter = (colour) => {
    const at = COLOURS.indexOf(colour);
    return at < 0 ? colour : BRIGHT[at];
  };
  const traceIn = (dark) => (trace) => {
    if (!dark) return trace;
    if (trace.type === "heatmap")
      return { ...trace, colorscale: trace.zmin < 0 ? SIGNED : SIZES };
    const line = trace.line && { ...trace.line, color: brighter(trace.line.color) };
    const marker = trace.marker && typeof trace.marker.color === "string"
      ? { ...trace.marker, color: brighter(trace.marker.color) } : trace.marker;
    return { ...trace, ...(line && { line }), ...(marker && { marker }) };
  };
  const layoutIn = (layout, dark, width) => {
    const of = dark ? DARK : LIGHT;
    const axis = { gridcolor: of.grid, zerolinecolor: of.zero, linecolor: of.grid, tickcolor: of.grid };
    const axes = Object.keys(layout).filter((name) => /^[xy]axis/.test(name));
    return {
      ...layout,
      ...Object.fromEntries(axes.map((name) => [name, { automargin: true, ...layout[name], ...axis }])),
      colorway: dark ? BRIGHT : COLOURS,
      font: { ...layout.font, color: of.ink },
      hoverlabel: { bgcolor: of.box, font: { color: of.ink } },
      legend: { ...layout.legend, bgcolor: "rgba(0,0,0,0)" },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: of.plot,
      ...(width ? { width, autosize: false } : { autosize: true }),
    };
  };
  const figures = new WeakMap();
  const show = (plot, { dark = prefersDark.matches, width, height = Infinity } = {}) => {
    const { data, layout } = figures.get(plot);
    const sized = layout.height > height ? { ...layout, height } : layout;
    Plotly.react(plot, data.map(traceIn(dark)), layoutIn(sized, dark, width), OPTIONS);
  };
  const drawPlot = (plot) => {
    need("Plotly");
    const stored = plot.querySelector("script");
    figures.set(plot, JSON.parse(stored.textContent));
    stored.remove();
    show(plot);
  };
  const drawn = () => [...document.querySelectorAll(".ml-plot")].filter((plot) => figures.has(plot));
  prefersDark.addEventListener("change", () => drawn().forEach((plot) => show(plot)));

  // circuitsvis renders by id, so every root gets one here.
  window.metaoptLensRoots = window.metaoptLensRoots || 0;
  const drawTokens = (root) => {
    need("CircuitsVis");
    root.id = `ml-cv-${window.metaoptLensRoots++}`;
    CircuitsVis.render(root.id, CircuitsVis[root.dataset.element], JSON.parse(root.dataset.props));
  };

  // ---- drawing: what is not folded away, a little at a time, after the page has been shown ------------------------

  const draw = (el) => {
    el.dataset.ready = "1";
    (el.classList.contains("ml-plot") ? drawPlot : drawTokens)(el);
  };
  const waiting = () =>
    [...document.querySelectorAll(".ml-plot:not([data-ready]), .ml-cv:not([data-ready])")].filter(
      (el) => !el.closest("details:not([open])"),
    );
  let due = false;
  const some = () => {
    due = false;
    const until = performance.now() + 20;
    for (const el of waiting()) {
      if (performance.now() > until) return soon();
      draw(el);
    }
  };
  const soon = () => {
    if (!due) setTimeout(some);
    due = true;
  };

  // ---- tables ------------------------------------------------------------------------------------------------------

  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.order ?? cell.textContent;
    if (text === "-inf") return -Infinity; // no value
    return text === "" || Number.isNaN(Number(text)) ? text : Number(text);
  };
  const sortable = (within) => {
    for (const table of fresh("table.ml-sortable", within))
      for (const header of table.tHead.rows[0].cells) {
        const button = document.createElement("button"); // for the keyboard
        button.type = "button";
        button.append(...header.childNodes);
        header.append(button);
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
  };

  // A stored table becomes one when it is opened; its CSV is unpacked when it is asked for.
  const unfold = (details) => {
    const stored = details.querySelector(":scope > script[type='text/html']");
    if (!stored) return;
    stored.insertAdjacentHTML("afterend", stored.textContent);
    stored.remove();
    sortable(details);
  };
  const unpack = async (link) => {
    const packed = Uint8Array.from(atob(link.dataset.gzip), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    link.href = URL.createObjectURL(new Blob([await new Response(stream).arrayBuffer()], { type: "text/csv" }));
    delete link.dataset.gzip;
    link.click();
  };
  for (const link of fresh("a[data-gzip]"))
    link.addEventListener("click", (event) => {
      if (!link.dataset.gzip) return;
      event.preventDefault();
      unpack(link);
    });

  // ---- opening ---------------------------------------------------------------------------------------------------

  document.addEventListener(
    "toggle",
    (event) => {
      if (!event.target.open) return;
      unfold(event.target);
      soon();
    },
    true,
  );
  const openTarget = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let at = target || null; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target) target.scrollIntoView();
  };
  window.addEventListener("hashchange", openTarget);
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href^='#']");
    if (link && link.hash && link.hash === location.hash) openTarget(); // a second click on the same link
  });
  openTarget();

  // ---- paper: everything open but stored tables, everything drawn, dark ink, and as wide as a page ------------------

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open]):not(.ml-data)")];
    for (const details of opened) details.open = true;
    waiting().forEach(draw);
    for (const plot of drawn()) show(plot, { dark: false, width: plot.closest(".ml-maps, .ml-cards") ? 330 : 680, height: 440 }); // two to a page
  });
  window.addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
    opened = [];
    for (const plot of drawn()) show(plot);
  });

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
  sortable(document);
  requestAnimationFrame(soon);
})();
