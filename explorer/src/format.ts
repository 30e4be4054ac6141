// Numbers as text, and elements of index.html.

export const count = (n: number) => n.toLocaleString("en");

export const cellsText = (n: number) => `${count(n)} ${n === 1 ? "cell" : "cells"}`;

export const percent = (share: number) =>
  share > 0 && share < 0.001 ? "<0.1%" : `${(100 * share).toFixed(share && share < 0.0995 ? 1 : 0)}%`;

export function find<T extends Element = HTMLElement>(selector: string): T {
  const element = document.querySelector<T>(selector);
  if (!element) throw new Error(`the page lacks ${selector}`);
  return element;
}
