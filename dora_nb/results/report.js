"use strict";
// Everything from files is set as text, never as HTML.
const byId = (id) => document.getElementById(id);
const make = (name, text = "", label = "") => Object.assign(document.createElement(name), { textContent: text, className: label });
const unpack = async (id) => {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
};

// DataTables' own colours follow a class.
const dark = matchMedia("(prefers-color-scheme: dark)");
const paint = () => document.documentElement.classList.toggle("dark", dark.matches);
dark.addEventListener("change", paint);
paint();

// The value of the mark nearest to the pointer.
function showValues(picture, marks) {
  const tip = picture.appendChild(make("output")), image = picture.querySelector("img");
  const show = (event) => {
    const box = image.getBoundingClientRect(), outer = picture.getBoundingClientRect();
    const away = ([x, y]) => Math.hypot(box.left + x * box.width - event.clientX, box.top + y * box.height - event.clientY);
    const near = marks.reduce((best, mark) => (away(mark) < away(best) ? mark : best));
    tip.hidden = away(near) > 24;
    tip.textContent = near[2];
    const left = box.left - outer.left + picture.scrollLeft + near[0] * box.width;
    tip.style.left = `${Math.max(0, Math.min(left + 10, picture.scrollLeft + outer.width - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, near[1] * box.height - tip.offsetHeight - 8)}px`;
  };
  tip.hidden = true;
  picture.addEventListener("pointermove", show);
  picture.addEventListener("pointerdown", show);
  picture.addEventListener("pointerleave", () => (tip.hidden = true));
}

// A column whose cells begin with numbers is sorted by these, and others as text with its numbers in order.
const leading = (text) => text.replaceAll(",", "").replace("−", "-").match(/^\s*([+-]?\d+(\.\d+)?(e[+-]?\d+)?)(?![\w.])/i)?.[1];
const natural = (text) => text.replace(/\d+(\.\d+)?(e-?\d+)?/gi, (number) => Number(number).toFixed(9).padStart(24, "0"));
function sortable($, table) {
  const cells = [...table.tBodies[0].rows].map((row) => [...row.cells]);
  const isNumeric = (j) => cells.every((row) => leading(row[j].textContent) || /^\s*[–-]?\s*$/.test(row[j].textContent));
  const numeric = [...table.tHead.rows[0].cells].map((_, j) => isNumeric(j));
  const key = (text, j) => (numeric[j] ? (leading(text) ?? -1e99) : natural(text));
  for (const row of cells) row.forEach((cell, j) => (cell.dataset.order = key(cell.textContent, j)));
  const columns = numeric.map((is) => ({ type: is ? "num" : "string" }));
  $(table).DataTable({ paging: false, searching: false, info: false, autoWidth: false, order: [], columns });
}

// The questions: one group at a time, two kinds of runs beside each other.
function questions($, groups) {
  const fill = (id, words, chosen) => byId(id).replaceChildren(...words.map((text, i) => new Option(text, i, false, i === chosen)));
  let table;
  const draw = () => {
    const group = groups[byId("group").value], search = table?.search() ?? "";
    const names = ["first", "second"].map((id) => group.kinds[byId(id).value]);
    const sides = ["first", "second"].map((id) => group.runs.filter((run) => run.kind == byId(id).value));
    const every = sides[0].flatMap((a) => sides[1].map((b) => [a, b]));
    const pairs = every.filter(([a, b]) => a.seed === null || b.seed === null || a.seed === b.seed);
    const share = (side, i) => side.filter((run) => run.answers[i] === group.gold[i]).length / side.length;
    const ahead = (i) => share(sides[1], i) - share(sides[0], i);
    const differ = (i) => (pairs.length ? pairs : every).some(([a, b]) => a.answers[i] !== b.answers[i]);
    const shown = [() => true, differ, (i) => ahead(i) < 0, (i) => ahead(i) > 0][byId("show").value];
    const most = 1 + Math.max(...new Set([group.gold, ...sides.flat().map((run) => run.answers)].flat()));
    const choices = (i) => group.texts?.[i][1] ?? Array.from({ length: most }, (_, k) => `choice ${k}`);
    const given = (item, i, k) => {
      sides.forEach((side, s) => {
        const count = side.filter((run) => run.answers[i] === k).length;
        if (count) item.append(make("span", side.length > 1 ? `${names[s]} ${count}/${side.length}` : names[s], "by"));
      });
      return item;
    };
    const question = (td, i) => {
      const list = make("ol");
      choices(i).forEach((text, k) => list.append(given(make("li", text, k === group.gold[i] ? "right" : ""), i, k)));
      const none = given(make("li", "no choice"), i, null);
      if (none.children.length) list.append(none);
      td.replaceChildren(...(group.texts?.[i][0] ? [make("p", group.texts[i][0])] : []), list);
    };
    // DataTables reads what it searches as HTML.
    const searched = (i) => [group.texts?.[i][0], ...choices(i)].join(" ").replaceAll("&", "&amp;").replaceAll("<", "&lt;");
    const score = (side, i) => `${side.filter((run) => run.answers[i] === group.gold[i]).length}/${side.length}`;
    const value = (of, text) => (i, type) => (type === "display" ? text(i) : of(i));
    const label = (words) => (td) => td.setAttribute("data-label", words);
    table?.destroy();
    const heads = ["item", "question and answers", ...names.map((name) => `${name} right`), "difference"];
    byId("items").replaceChildren(make("thead"));
    byId("items").tHead.append(make("tr"));
    heads.forEach((words) => byId("items").tHead.rows[0].append(make("th", words)));
    table = $(byId("items")).DataTable({
      data: group.ids.map((_, i) => i).filter(shown).map((i) => [i]),
      deferRender: true,
      autoWidth: false,
      order: [],
      search: { search: search },
      pageLength: 10,
      language: { info: "_START_ to _END_ of _TOTAL_ questions", infoEmpty: "no question", infoFiltered: "(of _MAX_)", emptyTable: "no question", zeroRecords: "no question", lengthMenu: "_MENU_ per page", search: "Search" },
      columns: [
        { data: 0, render: (i) => group.ids[i], createdCell: label("item") },
        { data: 0, type: "string", orderable: false, render: (i, type) => (type === "filter" ? searched(i) : ""), createdCell: question },
        { data: 0, type: "num", render: value((i) => share(sides[0], i), (i) => score(sides[0], i)), createdCell: label(heads[2]) },
        { data: 0, type: "num", render: value((i) => share(sides[1], i), (i) => score(sides[1], i)), createdCell: label(heads[3]) },
        { data: 0, type: "num", render: value(ahead, (i) => ahead(i).toFixed(2)), createdCell: label(heads[4]) },
      ],
    });
    byId("why").textContent = group.texts ? "" : `Only numbers are shown, and no texts: ${group.why}.`;
  };
  const choose = () => {
    const { kinds, first, second } = groups[byId("group").value];
    fill("first", kinds, first);
    fill("second", kinds, second);
    draw();
  };
  fill("group", groups.map((group) => group.name), 0);
  fill("show", ["all questions", "where their answers differ", "where the first is right more often", "where the second is right more often"], 0);
  byId("group").addEventListener("change", choose);
  for (const id of ["first", "second", "show"]) byId(id).addEventListener("change", draw);
  choose();
}

(async () => {
  const marks = JSON.parse(await unpack("marks"));
  for (const picture of document.querySelectorAll(".picture")) {
    const own = marks[picture.dataset.name];
    if (own?.length) showValues(picture, own);
  }
  const { jQuery } = await import(URL.createObjectURL(new Blob([await unpack("library")], { type: "text/javascript" })));
  jQuery.fn.dataTable.ext.errMode = "throw"; // and no alert
  document.querySelectorAll(".table table:has(tbody)").forEach((table) => sortable(jQuery, table));
  questions(jQuery, JSON.parse(await unpack("data")));
  document.documentElement.dataset.ready = "";
})();
