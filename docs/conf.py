"""Settings of the documentation's site: ``make docs``, then open build/docs/index.html."""

project = "opd"
extensions = ["myst_parser"]
myst_heading_anchors = 3
exclude_patterns = ["Thumbs.db"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository that are not pages
smartquotes = False  # a flag keeps its two dashes
html_theme = "furo"
html_title = "opd"
html_static_path = ["_static"]
html_css_files = ["site.css"]
