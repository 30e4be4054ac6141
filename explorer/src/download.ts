// Files that the page makes.

import Papa from "papaparse";

/** Of a file about the cells of the page. */
export const fileName = (title: string, what: string) => `${title.replace(/\.\w+$/, "").replace(/[^\w.-]+/g, "_")}_${what}`;

export function download(name: string, content: string | Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Text that a spreadsheet would run as a formula gets a ' before it; NaN is empty. */
export function downloadCsv(name: string, fields: string[], rows: (string | number)[][]): void {
  const data = rows.map((row) => row.map((value) => (Number.isNaN(value) ? null : value)));
  download(name, Papa.unparse({ fields, data }, { escapeFormulae: true }));
}
