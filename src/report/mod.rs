//! Self-contained HTML pages and SVG charts, for light and dark screens: no script, no external resource. JUnit XML and SARIF for
//! machines.
//!
//! Knows nothing of training or parity, which say what is on a page.

mod chart;
mod heat;
mod junit;
mod page;
mod sarif;

pub use chart::{Chart, Series};
pub use heat::{Bar, HeatMap, bars};
pub use junit::{Outcome, Suite, Test, junit};
pub use page::{Page, escape};
pub use sarif::{Finding, Rule, sarif};
