// Numbers and tables as text, files to download, and elements of index.html.

import Papa from "papaparse";

export const count = (n: number) => n.toLocaleString("en");

export const percent = (share: number) =>
  share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;

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

export function find<T extends Element = HTMLElement>(selector: string): T {
  const element = document.querySelector<T>(selector);
  if (!element) throw new Error(`the page lacks ${selector}`);
  return element;
}
