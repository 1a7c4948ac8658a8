// The routing viewer: heat maps of one run's tokens, and the bytes on its links, at the step that the slider is on.
"use strict";

(() => {
  const runs = JSON.parse(document.getElementById("viewer-data").textContent);
  const at = (name) => document.getElementById(`viewer-${name}`);
  const SVG = "http://www.w3.org/2000/svg";
  const LARGEST_FIELD = 30;
  const LEFT = 56; // room for the names of the rows, in pixels
  const TOP = 18;

  const number = (value) => value.toLocaleString("en-GB", { maximumFractionDigits: 0 });
  const percent = (part, whole) => (whole > 0 ? `${((100 * part) / whole).toFixed(1)} %` : "-");

  function bytes(value) {
    if (value === null) return "-"; // this step was not metered
    const units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let power = 0;
    while (value >= 1024 && power < units.length - 1) {
      value /= 1024;
      power += 1;
    }
    return `${value === 0 ? 0 : value.toPrecision(3)} ${units[power]}`;
  }

  function element(name, content, attributes) {
    const made = document.createElement(name);
    if (content !== undefined) made.textContent = content;
    Object.assign(made, attributes);
    return made;
  }

  function drawn(name, attributes, content) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (content !== undefined) made.textContent = content;
    return made;
  }

  // Light to dark in one hue, so that the order shows without seeing colours.
  const colour = (share) => `hsl(206 ${60 + 30 * share}% ${97 - 69 * share}%)`;

  const run = () => runs[Number(at("run").value)];
  const step = () => Number(at("step").value);
  const layers = () => (at("layer").value === "all" ? [...Array(run().layers).keys()] : [Number(at("layer").value)]);

  // The sum over the chosen layers of numbers [steps, layers, ranks, columns] at one step: [ranks, columns], flat.
  function matrix(numbers, columns, index) {
    const size = run().ranks * columns;
    const sum = new Array(size).fill(0);
    for (const layer of layers()) {
      const start = (index * run().layers + layer) * size;
      for (let i = 0; i < size; i += 1) sum[i] += numbers[start + i];
    }
    return sum;
  }

  // One scale for all steps, so that a field that darkens has more tokens.
  function largest(numbers, columns) {
    let found = 0;
    for (let index = 0; index < run().steps.length; index += 1) {
      for (const value of matrix(numbers, columns, index)) found = Math.max(found, value);
    }
    return found;
  }

  function heatMap(host, numbers, columns, columnName) {
    const rows = run().ranks;
    const field = Math.max(4, Math.min(LARGEST_FIELD, Math.floor((host.clientWidth - LEFT - 2) / columns)));
    const width = LEFT + field * columns + 2;
    const svg = drawn("svg", { width, height: TOP + field * rows + 2, role: "img" });
    svg.append(drawn("title", {}, `copies from each rank to each ${columnName}`));
    const every = Math.max(1, Math.ceil(26 / field));
    for (let column = 0; column < columns; column += every) {
      const x = LEFT + field * (column + 0.5);
      svg.append(drawn("text", { x, y: TOP - 5, "text-anchor": "middle" }, column));
    }
    const everyRow = Math.max(1, Math.ceil(14 / field));
    const fields = [];
    for (let row = 0; row < rows; row += 1) {
      const y = TOP + field * row;
      if (row % everyRow === 0) {
        svg.append(drawn("text", { x: LEFT - 6, y: y + field / 2 + 4, "text-anchor": "end" }, `rank ${row}`));
      }
      for (let column = 0; column < columns; column += 1) {
        const x = LEFT + field * column;
        const rect = drawn("rect", { x, y, width: field - 1, height: field - 1, class: "field" });
        rect.dataset.index = row * columns + column;
        fields.push(rect);
        svg.append(rect);
      }
    }
    const scale = element("p", "0 ", { className: "scale" });
    const ramp = element("i");
    ramp.style.background = `linear-gradient(to right, ${colour(0)}, ${colour(0.5)}, ${colour(1)})`;
    const most = largest(numbers, columns);
    scale.append(ramp, ` ${number(most)} copies, the most at any step`);
    host.replaceChildren(svg, scale);
    const name = (index) => `rank ${Math.floor(index / columns)} to ${columnName} ${index % columns}`;
    return { columns, fields, host, most, name, numbers };
  }

  let maps = [];
  let chosen = null; // {map: index of the map, index: of the field}

  function read(map, index) {
    const sums = matrix(map.numbers, map.columns, step());
    const start = Math.floor(index / map.columns) * map.columns;
    const whole = sums.slice(start, start + map.columns).reduce((sum, value) => sum + value, 0);
    const level = map.ofPair ? `, over level ${run().levels[map.ofPair[index]]}` : "";
    at("readout").textContent =
      `${map.name(index)}${level}: ${number(sums[index])} copies, ${percent(sums[index], whole)} of the rank's`;
  }

  // Names of the row and column that a map's field stands for follow the finger, the mouse and the slider.
  function show() {
    const here = run();
    at("step-name").textContent = `${here.steps[step()]} (${step() + 1} of ${here.steps.length} shown)`;
    maps.forEach((map, place) => {
      const sums = matrix(map.numbers, map.columns, step());
      map.fields.forEach((rect, index) => {
        rect.setAttribute("fill", colour(map.most > 0 ? sums[index] / map.most : 0));
        rect.classList.toggle("chosen", chosen !== null && chosen.map === place && chosen.index === index);
      });
    });
    if (chosen !== null && maps[chosen.map]) read(maps[chosen.map], chosen.index);
    showLevels();
  }

  function showLevels() {
    const here = run();
    const met = here.classes.map((name) => name.split("/"));
    const levels = [...new Set([...here.levels, ...met.map(([level]) => level)])];
    const kinds = [...new Set(met.map(([, kind]) => kind))];
    const most = Math.max(1, ...here.bytes.flatMap((values) => values.filter((_, i) => met[i][0] !== "self")));
    const table = element("table");
    const head = table.createTHead().insertRow();
    const titles = ["level", ...(here.levelOfPair ? ["copies, before drops"] : []), ...kinds.map((kind) => `${kind} bytes`)];
    for (const title of titles) head.append(element("th", title, { scope: "col" }));
    const body = table.createTBody();
    const copies = here.levelOfPair && here.links ? matrix(here.links, here.ranks, step()) : null;
    const whole = copies ? copies.reduce((sum, value) => sum + value, 0) : 0;
    for (const level of levels) {
      const line = body.insertRow();
      line.append(element("td", level === "self" ? "self (stays on its rank)" : level));
      if (here.levelOfPair) {
        const own = copies ? copies.filter((_, i) => here.levels[here.levelOfPair[i]] === level) : [];
        const sum = own.reduce((total, value) => total + value, 0);
        line.append(element("td", copies ? `${number(sum)} (${percent(sum, whole)})` : "-"));
      }
      for (const kind of kinds) {
        const place = here.classes.indexOf(`${level}/${kind}`);
        const value = place < 0 ? 0 : here.bytes[step()][place];
        const cell = element("td", bytes(value), { className: "bar" });
        const bar = element("i");
        bar.style.width = `${Math.min(100, (100 * value) / most)}%`;
        if (level !== "self") cell.append(bar);
        line.append(cell);
      }
    }
    const scroll = element("div", undefined, { className: "scroll", tabIndex: 0 });
    scroll.append(table);
    const told = kinds.length
      ? "Bytes of the whole step over all ranks and layers, as counted, reductions as a ring moves them; " +
        "a full bar is the most that any class sends over a level at any step."
      : "No bytes were recorded.";
    at("levels").replaceChildren(scroll, element("p", told, { className: "kind" }));
  }

  function lay() {
    const here = run();
    maps = [heatMap(at("experts"), here.counts, here.experts, "expert")];
    at("no-links").hidden = here.links !== null;
    at("no-links").textContent = here.noLinks;
    if (here.links) {
      maps.push({ ...heatMap(at("links"), here.links, here.ranks, "rank"), ofPair: here.levelOfPair });
    } else {
      at("links").replaceChildren();
    }
    maps.forEach((map, place) => {
      const told = (event, keep) => {
        const index = event.target.dataset.index;
        if (index === undefined) return;
        if (keep) {
          chosen = { map: place, index: Number(index) };
          show();
        } else {
          read(map, Number(index));
        }
      };
      map.host.onpointermove = (event) => told(event, false);
      map.host.onpointerleave = () => chosen && maps[chosen.map] && read(maps[chosen.map], chosen.index);
      map.host.onclick = (event) => told(event, true);
    });
    show();
  }

  function choose() {
    const here = run();
    chosen = null;
    at("readout").textContent = "Point at a field or touch it to read its number.";
    at("label").textContent =
      `${here.label}; ${here.kind}; ${here.steps.length} of ${here.logged} logged steps are in this page.`;
    const names = [...Array(here.layers).keys()].map((layer) => element("option", `layer ${layer}`, { value: layer }));
    at("layer").replaceChildren(element("option", "all layers", { value: "all" }), ...names);
    at("step").max = here.steps.length - 1;
    at("step").value = here.steps.length - 1;
    lay();
  }

  at("nothing").hidden = runs.length > 0;
  document.getElementById("viewer").hidden = runs.length === 0;
  if (runs.length === 0) return;
  at("run").append(...runs.map((one, index) => element("option", one.name, { value: index })));
  at("run").onchange = choose;
  at("layer").onchange = lay;
  at("step").oninput = show;
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    lay();
  }).observe(document.getElementById("viewer"));
  choose();
})();
