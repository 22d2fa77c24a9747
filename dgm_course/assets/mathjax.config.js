window.MathJax = {
  tex: {
    inlineMath: [["$", "$"], ["\\(", "\\)"]],
    displayMath: [["$$", "$$"], ["\\[", "\\]"]],
    processEscapes: true,
    processEnvironments: true,
  },
  // The menu would fetch its speech engine; the hidden MathML serves screen readers without it.
  options: { enableMenu: false, skipHtmlTags: ["script", "style", "textarea", "pre", "code"] },
  svg: { fontCache: "global" },
};
