// Elements are made by name and text: no string of the data is ever read as HTML.

type Child = Node | string | null;

export function element<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: Partial<HTMLElementTagNameMap[K]> | null = null,
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  if (properties) Object.assign(made, properties);
  made.append(...children.filter((child) => child !== null));
  return made;
}

export function find<T extends Element = HTMLElement>(selector: string): T {
  const found = document.querySelector<T>(selector);
  if (!found) throw new Error(`the page lacks ${selector}`);
  return found;
}

export function swatch(colour: string): HTMLElement {
  const made = element("i", { className: "swatch" });
  made.style.backgroundColor = colour;
  return made;
}

/** A bar of the share, with a mark where the share of all cells would be. */
export function bar(share: number, colour: string, mark?: number): HTMLElement {
  const filled = element("b");
  filled.style.width = `${100 * share}%`;
  filled.style.backgroundColor = colour;
  const made = element("span", { className: "bar" }, filled);
  if (mark !== undefined) {
    const line = element("i");
    line.style.left = `${100 * mark}%`;
    made.append(line);
  }
  return made;
}

export const count = (n: number) => n.toLocaleString("en");
export const percent = (share: number) =>
  share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}%`;

export function download(name: string, content: Blob): void {
  const link = element("a", { href: URL.createObjectURL(content), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** A row of a CSV file: quoted where it must be; a text that a spreadsheet would run as a formula gets a ' before it. */
export function csvRow(values: (string | number)[]): string {
  const field = (value: string | number) => {
    const text = typeof value === "number" ? (Number.isFinite(value) ? String(value) : "") : value.replace(/^(?=[=+\-@\t\r])/, "'");
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return `${values.map(field).join(",")}\r\n`;
}
