//! An HTML page.

use std::fmt::Write;

/// A page under construction: sections of text, tables and charts in the order in which they are added.
#[derive(Clone, Debug)]
pub struct Page {
    title: String,
    body: String,
}

/// Colours of series 1 to 6 tell apart for most colour-blind eyes (Okabe and Ito), in both schemes.
const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60646c; --line: #d9dce1; --ground: #ffffff; --panel: #f7f8fa;
  --s1: #0072b2; --s2: #d55e00; --s3: #009e73; --s4: #cc79a7; --s5: #8a6d00; --s6: #3a87ad; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9ba1a9; --line: #363b42; --ground: #14171a;
  --panel: #1b1f23; --s1: #56b4e9; --s2: #ff8c42; --s3: #2fc79a; --s4: #e5a3c6; --s5: #f0e442; --s6: #8ec7e8; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.05rem; margin-top: 2rem; } p { max-width: 46rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.number, th.number { text-align: right; white-space: nowrap; }
td.hash { font: .75rem/1.6 ui-monospace, monospace; word-break: break-all; min-width: 18rem; }
.pass { color: var(--s3); font-weight: 600; } .fail { color: var(--s2); font-weight: 600; }
.scroll { overflow-x: auto; } .charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); }
figure { margin: 0; padding: .75rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
figcaption { font-weight: 500; margin-bottom: .25rem; } svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } svg .grid { stroke: var(--line); }
svg .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; } svg .faint { opacity: .3; }
";

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Self {
        Self { title: title.into(), body: String::new() }
    }

    /// A heading.
    pub fn heading(&mut self, text: &str) -> &mut Self {
        self.add(format_args!("<h2>{}</h2>\n", escape(text)))
    }

    /// A paragraph.
    pub fn paragraph(&mut self, text: &str) -> &mut Self {
        self.add(format_args!("<p>{}</p>\n", escape(text)))
    }

    /// A table; cells that are numbers stand at the right.
    pub fn table(&mut self, header: &[&str], rows: &[Vec<String>]) -> &mut Self {
        let is_number =
            |text: &str| text.trim_end_matches([' ', '%']).replace(['\u{2212}', ' '], "").parse::<f64>().is_ok();
        let row = |cells: &[String], tag: &str| {
            let cell = |text: &String| {
                let class = if is_number(text) {
                    " class=\"number\""
                } else if is_hash(text) {
                    " class=\"hash\""
                } else {
                    ""
                };
                format!("<{tag}{class}>{}</{tag}>", marked(text))
            };
            format!("<tr>{}</tr>\n", cells.iter().map(cell).collect::<String>())
        };
        let header: Vec<String> = header.iter().map(ToString::to_string).collect();
        let head = if header.is_empty() { String::new() } else { row(&header, "th") };
        let rows: String = rows.iter().map(|cells| row(cells, "td")).collect();
        self.add(format_args!("<div class=\"scroll\"><table>\n{head}{rows}</table></div>\n"))
    }

    /// Charts beside each other, each an SVG element with a caption.
    pub fn charts(&mut self, charts: &[super::Chart]) -> &mut Self {
        self.add(format_args!("<div class=\"charts\">\n"));
        for chart in charts {
            let caption = escape(chart.title());
            self.add(format_args!("<figure><figcaption>{caption}</figcaption>\n{}</figure>\n", chart.svg()));
        }
        self.add(format_args!("</div>\n"))
    }

    /// A picture, an SVG element, with a caption.
    pub fn figure(&mut self, caption: &str, svg: &str) -> &mut Self {
        self.add(format_args!("<figure><figcaption>{}</figcaption>\n{svg}</figure>\n", escape(caption)))
    }

    /// The page as a document.
    pub fn html(&self) -> String {
        let title = escape(&self.title);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{}</body>\n</html>\n",
            self.body
        )
    }

    fn add(&mut self, text: std::fmt::Arguments<'_>) -> &mut Self {
        if self.body.write_fmt(text).is_err() {
            tracing::debug!("a part of the page could not be formatted");
        }
        self
    }
}

/// Whether a text is a sha256.
fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A cell's text, with a verdict at its beginning in colour.
fn marked(text: &str) -> String {
    for (verdict, class) in [("pass", "pass"), ("FAIL", "fail")] {
        if let Some(rest) = text.strip_prefix(verdict).filter(|rest| rest.is_empty() || rest.starts_with(':')) {
            return format!("<span class=\"{class}\">{verdict}</span>{}", escape(rest));
        }
    }
    escape(text)
}

/// Text as HTML and XML show it.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // control characters are not allowed in XML 1.0
            c if c.is_control() && !matches!(c, '\n' | '\r' | '\t') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_and_nothing_is_fetched() {
        let mut page = Page::new("a & b");
        page.heading("<script>")
            .paragraph("x \"y\" \u{1}")
            .table(&["name", "n"], &[vec!["<b>".into(), "1.5 %".into()]]);
        page.table(&[], &[vec!["FAIL: 1 < 2".into(), "ab".repeat(32), "passing".into()]]);
        let html = page.html();
        assert!(html.contains("<span class=\"fail\">FAIL</span>: 1 &lt; 2</td><td class=\"hash\">abab"));
        assert!(html.contains("<td>passing</td>"));
        assert!(html.contains("<title>a &amp; b</title>") && html.contains("<h2>&lt;script&gt;</h2>"));
        assert!(html.contains("<td>&lt;b&gt;</td><td class=\"number\">1.5 %</td>") && html.contains('\u{fffd}'));
        assert!(!html.contains("<script") && !html.contains("http") && !html.contains("url("));
    }
}
