//! What kind of attention each layer has.

use serde_json::{Value, json};

use super::super::Result;
use super::Config;

impl Config<'_> {
    /// For each layer, whether its attention slides over a window: `layer_types`, or else what `sliding` says.
    pub(super) fn sliding_layers(&self, layers: usize, sliding: impl Fn(usize) -> bool) -> Result<Vec<bool>> {
        let Some(kinds) = self.per_layer("layer_types", layers)? else { return Ok((0..layers).map(sliding).collect()) };
        let kind = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => self.fail(
                "layer_types",
                format!("holds {kind}, a kind of attention that prefold does not compute"),
                "known: full_attention, sliding_attention",
            ),
        };
        kinds.iter().map(kind).collect()
    }

    /// The same where every so many layers one does not slide. The field that says how many counts only without
    /// `layer_types`.
    pub(super) fn sliding_but_each(&self, layers: usize, interval: &str) -> Result<Vec<bool>> {
        let interval = if self.get("layer_types").is_some() { 1 } else { self.size(interval)? };
        self.sliding_layers(layers, |layer| !(layer + 1).is_multiple_of(interval))
    }

    /// The windows of the layers that have one.
    pub(super) fn windows(&self, sliding: &[bool], window: Option<usize>) -> Result<Vec<Option<usize>>> {
        if window.is_none() && sliding.contains(&true) {
            let why = "is missing, and there are layers of sliding_attention";
            return self.fail("sliding_window", why, "give it (and use_sliding_window, where the family has that)");
        }
        Ok(sliding.iter().map(|sliding| window.filter(|_| *sliding)).collect())
    }

    /// The window of a family that gives it to all layers or none.
    pub(super) fn common_window(&self, layers: usize) -> Result<Option<usize>> {
        let window = self.optional_size("sliding_window")?;
        let slides = window.is_some();
        if self.sliding_layers(layers, |_| slides)?.contains(&!slides) {
            let why = format!("differs from sliding_window, which is {}", json!(window));
            return self.fail("layer_types", why, "models of this family have the same attention in all layers");
        }
        Ok(window)
    }

    /// `sliding_window`, where `use_sliding_window` turns it on.
    pub(super) fn optional_window(&self) -> Result<Option<usize>> {
        if self.bool("use_sliding_window")? { self.optional_size("sliding_window") } else { Ok(None) }
    }
}
