// Sort and filter the list of runs.
const table = document.querySelector(".runs table");
const body = table.tBodies[0];
const rows = [...body.rows];
const value = (row, column) => {
  const text = row.cells[column].textContent.trim();
  return text !== "" && !isNaN(text) ? Number(text) : text;
};
table.querySelectorAll("thead button").forEach((button) => {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const down = header.getAttribute("aria-sort") === "ascending";
    table.querySelectorAll("th[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const column = header.cellIndex;
    const compare = (one, two) => {
      const [a, b] = [value(one, column), value(two, column)];
      const isLess = typeof a === typeof b ? a < b : typeof a === "number";
      return a === b ? 0 : (isLess ? -1 : 1) * (down ? -1 : 1);
    };
    body.append(...rows.sort(compare));
  });
});
document.querySelector(".filter input").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/);
  let shown = 0;
  for (const row of rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    shown += !row.hidden;
  }
  document.querySelector(".filter output").textContent = `${shown} of ${rows.length} runs`;
});
