//! Self-contained HTML pages and SVG charts, for light and dark screens: no script, no external resource.
//!
//! Knows nothing of training or parity, which say what is on a page.

mod chart;
mod page;

pub use chart::{Chart, Series};
pub use page::{Page, escape};
