// The excerpts of search results: the text of a page without its buttons and its printed table of contents.
if (typeof Search !== "undefined") {
  const plain = Search.htmlToText;
  Search.htmlToText = (html, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".bd-header-article, #jb-print-docs-body, .bd-sidebar-secondary").forEach((e) => e.remove());
    return plain(page.documentElement.outerHTML, anchor);
  };
}
