(() => {
  "use strict";
  const signed = (x) => {
    const size = Math.abs(x).toFixed(2);
    return Number(size) === 0 ? size : (x < 0 ? "−" : "+") + size;
  };
  const shade = (x, bound, most) =>
    `rgba(${x >= 0 ? "29, 95, 191" : "194, 65, 12"}, ${(most * Math.min(Math.abs(x) / (bound || 1), 1)).toFixed(3)})`;
  const element = (name, text, of) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (of) made.className = of;
    return made;
  };
  const code = (text) => element("code", text);
  const add = (values) => values.reduce((a, b) => a + b, 0);
  // Numbers in half precision, little-endian, in base64, times their unit.
  const halves = ({ unit, data }) => {
    const raw = atob(data);
    return Float64Array.from({ length: raw.length / 2 }, (_, i) => {
      const bits = raw.charCodeAt(2 * i) | (raw.charCodeAt(2 * i + 1) << 8);
      const exponent = (bits >> 10) & 31;
      const size = exponent ? 2 ** (exponent - 15) * (1 + (bits & 1023) / 1024) : 2 ** -24 * (bits & 1023);
      return (bits & 32768 ? -size : size) * unit;
    });
  };

  for (const root of document.querySelectorAll(".ml-found")) {
    if (root.dataset.ready) continue;
    root.dataset.ready = "1";
    const data = JSON.parse(root.dataset.found);
    const find = (name) => root.querySelector(name);
    const [first, stop] = [data.demos[0][0], data.demos.at(-1)[1]];
    const place = Object.fromEntries(data.heads.map((name, index) => [name, index]));
    const state = { head: "", scope: "all", value: "tokens", off: new Set(), view: data.default };
    const view = () => data.views[state.view];
    const isDemo = (i) => i >= first && i < stop;
    const inScope = (i) => state.scope === "all" || isDemo(i) === (state.scope === "demo");

    const decoded = (name) => {
      const of = view();
      if (!(of[name].data instanceof Float64Array)) of[name].data = halves(of[name]);
      const values = of[name].data, n = values.length / data.heads.length;
      return (head) => values.subarray(head * n, (head + 1) * n);
    };

    // A head's tokens, its softmax renormalised without the demonstrations that are off: queries, keys and values held.
    const renormalised = (name, head) => {
      const values = decoded(name)(head);
      if (!state.off.size) return values;
      const { rest, masses } = view();
      const seen = rest[head] + add(masses[head].filter((_, demo) => !state.off.has(demo)));
      const whole = rest[head] + add(masses[head]);
      const out = values.map((x) => (x * whole) / seen);
      for (const demo of state.off) out.fill(0, ...data.demos[demo]);
      return out;
    };
    const parts = (head) => {
      if (!state.off.size) return [view().zs[head], view().mg[head]];
      const values = renormalised("tokens", head);
      const demos = add(values.slice(first, stop));
      return [add(values) - demos, demos];
    };

    const tokens = () => {
      const attention = state.head !== "" && state.value === "attention";
      const name = attention ? "attention" : "tokens";
      const values = renormalised(name, place[state.head] ?? 0).slice();
      if (state.head === "")
        for (let head = 1; head < data.heads.length; head++)
          renormalised(name, head).forEach((x, i) => (values[i] += x));
      const bound = values.reduce((most, x, i) => (inScope(i) ? Math.max(most, Math.abs(x)) : most), 0);
      const show = (x) => (attention ? x.toFixed(3) : signed(x));
      for (const row of root.querySelectorAll(".ml-tokens .ml-line")) {
        let total = 0, seen = false;
        for (const span of row.querySelectorAll(".ml-token")) {
          const i = Number(span.dataset.token);
          const value = values[i] ?? 0;
          total += value;
          seen ||= i <= view().at;
          span.style.background = inScope(i) ? shade(value, bound, 0.6) : "transparent";
          span.title = show(value);
          span.classList.toggle("ml-later", i > view().at);
          span.classList.toggle("ml-here", i === view().at);
        }
        row.hidden = !seen && row.classList.contains("ml-answer");
        row.querySelector(".ml-total").textContent = show(total);
        const button = row.querySelector("button.ml-name");
        if (button) row.classList.toggle("ml-off", state.off.has(Number(button.dataset.demo)));
      }
    };

    const maps = () => {
      const { zs, mg } = view();
      const bound = [...zs, ...mg].reduce((most, x) => Math.max(most, Math.abs(x)), 1e-9);
      const now = data.heads.map((_, head) => parts(head));
      root.querySelectorAll(".ml-grid").forEach((grid, part) => {
        for (const cell of grid.querySelectorAll("td")) {
          const value = now[place[cell.dataset.head]][part];
          cell.style.background = shade(value, bound, 1);
          cell.title = `${cell.dataset.head} ${signed(value)}`;
        }
      });
      for (const row of root.querySelectorAll(".ml-strong tbody tr"))
        now[place[row.dataset.head]].forEach((value, part) => (row.children[part + 1].textContent = signed(value)));
      return now;
    };

    const card = () => {
      const box = find(".ml-headcard");
      box.hidden = state.head === "";
      find(".ml-value").hidden = state.head === "";
      for (const cell of root.querySelectorAll("[data-head]"))
        cell.classList.toggle("ml-chosen", cell.dataset.head === state.head);
      if (state.head === "") return;
      const of = view(), head = place[state.head];
      box.replaceChildren(element("h3", state.head));
      const mass = add(renormalised("attention", head).slice(first, stop));
      const facts = [`attention on the ${data.noun}s ${mass.toFixed(3)}`];
      if (of.exact && state.head in of.exact) facts.push(`knock-out ${signed(of.exact[state.head])} (exact)`);
      if (of.first) facts.push(`knock-out ${signed(of.first[head])} (first-order estimate)`);
      box.append(element("p", facts.join(" · "), "ml-quiet"));
      const words = of.words[state.head], values = parts(head);
      [["zero-shot part", "zero_shot"], ["meta-gradient part", "meta_gradient"]].forEach(([part, key], index) => {
        const block = element("div", undefined, "ml-partcard");
        block.append(element("b", `${part} ${signed(values[index])}`));
        if (words)
          ["promotes", "suppresses"].forEach((what, side) => {
            const line = element("div");
            line.append(element("span", what, "ml-side"));
            for (const word of words[key][side]) line.append(code(word), " ");
            block.append(line);
          });
        box.append(block);
      });
    };

    // The logit without the demonstrations that are off: of a run of its own, or single runs added up.
    const status = (now) => {
      const line = find(".ml-status"), of = view();
      if (!state.off.size) return line.replaceChildren();
      const off = [...state.off].sort((a, b) => a - b);
      const stored = of.without[off.join(",")];
      const logit = stored ?? of.run + add(off.map((demo) => of.without[demo] - of.run));
      const change = data.heads.map((_, head) => add(now[head]) - of.zs[head] - of.mg[head]);
      const which = off.map((demo) => demo + 1).join(", ");
      line.replaceChildren(
        `Without ${data.noun}${off.length > 1 ? "s" : ""} ${which} the logit is ${stored === undefined ? "≈ " : ""}${signed(logit)}: ` +
          `${signed(logit - of.run)} against all of them${stored === undefined ? " (single runs added up)" : ""}.`,
        element("span", ` Written directly: all heads ${signed(add(change))}, the last layer's ${signed(add(change.slice(-data.n_heads)))}.`, "ml-direct"),
      );
    };

    const draw = () => {
      const now = maps();
      if (root.querySelector("[data-demo]")) status(now);
      card();
      tokens();
    };

    // Everything that depends on where the answer is read.
    const turn = () => {
      const of = view();
      const about = find(".ml-asked");
      about.replaceChildren("The logit of ", code(of.answer), of.versus.length ? " minus the mean of " : "");
      of.versus.slice(0, 8).forEach((token, i) => about.append(i ? ", " : "", code(token)));
      if (of.versus.length > 8) about.append(` and ${of.versus.length - 8} more`);
      about.append(" is ", element("b", signed(of.logit)));
      find(".ml-first").replaceChildren("There the model's first choice is ", code(of.top[0]), ` (${(100 * of.top[1]).toFixed(1)}%).`);
      const widest = of.sums.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-9);
      const cells = find(".ml-sums").children;
      of.sums.forEach((value, i) => {
        const bar = cells[3 * i + 1].firstElementChild, width = (50 * Math.abs(value)) / widest;
        bar.className = value < 0 ? "ml-minus" : "ml-plus";
        bar.style.width = `${width}%`;
        bar.style.left = `${value < 0 ? 50 - width : 50}%`;
        cells[3 * i + 2].textContent = signed(value);
      });
      find(".ml-strong tbody").replaceChildren(
        ...of.strong.map((name) => {
          const row = element("tr"), title = element("th"), button = element("button", name), said = element("td", undefined, "ml-said");
          row.dataset.head = button.dataset.head = name;
          button.type = "button";
          title.append(button);
          const [zs, mg] = [of.zs[place[name]], of.mg[place[name]]];
          row.append(title, element("td"), element("td"));
          if (of.exact) row.append(element("td", signed(of.exact[name])));
          for (const word of of.words[name]?.[Math.abs(zs) >= Math.abs(mg) ? "zero_shot" : "meta_gradient"][0] ?? [])
            said.append(code(word), " ");
          row.append(said);
          return row;
        }),
      );
      draw();
    };

    const choose = (head) => {
      state.head = head;
      find(".ml-pick").value = head;
      if (head === "") state.value = "tokens";
      card();
      tokens();
    };
    const press = (group, chosen) => {
      for (const button of group.querySelectorAll("button"))
        button.setAttribute("aria-pressed", String(button === chosen));
    };
    const pressDemos = () => {
      for (const button of root.querySelectorAll("[data-demo]"))
        button.setAttribute("aria-pressed", String(!state.off.has(Number(button.dataset.demo))));
      draw();
    };

    find(".ml-pick").addEventListener("change", (event) => choose(event.target.value));
    find(".ml-view")?.addEventListener("change", (event) => {
      state.view = Number(event.target.value);
      turn();
    });
    root.addEventListener("click", (event) => {
      const near = (name) => event.target.closest(`[${name}]`);
      const scope = near("data-scope"), value = near("data-value"), demo = near("data-demo"), head = near("data-head");
      if (scope) {
        state.scope = scope.dataset.scope;
        press(scope.parentElement, scope);
        tokens();
      } else if (value) {
        state.value = value.dataset.value;
        press(value.parentElement, value);
        tokens();
      } else if (demo) {
        const number = Number(demo.dataset.demo);
        if (!state.off.delete(number)) state.off.add(number);
        pressDemos();
      } else if (near("data-demos")) {
        const all = near("data-demos").dataset.demos === "all";
        state.off = new Set(all ? [] : data.demos.keys());
        pressDemos();
      } else if (head) choose(state.head === head.dataset.head ? "" : head.dataset.head);
    });
  }
})();
