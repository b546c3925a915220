//! Several hooks at once, as a graph that adapters were stacked into.

use candle_core::{Result, Tensor};

use crate::base::{Linear, LinearMap, Site, SiteHook};

/// The sum of what hooks add; the base model where there is none.
pub struct Together(Vec<Box<dyn SiteHook>>);

impl Together {
    /// All of these.
    pub fn new(hooks: Vec<Box<dyn SiteHook>>) -> Self {
        Self(hooks)
    }
}

impl SiteHook for Together {
    fn term(&self, site: &Site) -> Result<Option<Tensor>> {
        let mut sum: Option<Tensor> = None;
        for hook in &self.0 {
            sum = match (sum, hook.term(site)?) {
                (Some(sum), Some(term)) => Some((sum + term)?),
                (sum, term) => sum.or(term),
            };
        }
        Ok(sum)
    }

    fn linear(&self, map: &LinearMap) -> Result<Option<Tensor>> {
        let mut all: Option<Tensor> = None;
        for hook in &self.0 {
            all = match (all, hook.linear(map)?) {
                (Some(all), Some(output)) => Some((all + (output - map.output)?)?),
                (all, output) => all.or(output),
            };
        }
        Ok(all)
    }

    fn changes(&self, layer: usize, linear: Linear) -> bool {
        self.0.iter().any(|hook| hook.changes(layer, linear))
    }

    fn sees_unrotated(&self, layer: usize) -> bool {
        self.0.iter().any(|hook| hook.sees_unrotated(layer))
    }

    fn prefix(&self, layer: usize) -> Result<Option<(Tensor, Tensor)>> {
        let mut found = None;
        for hook in &self.0 {
            found = match (found, hook.prefix(layer)?) {
                (Some(_), Some(_)) => candle_core::bail!("two adapters have a prefix, and there is one place for it"),
                (found, prefix) => found.or(prefix),
            };
        }
        Ok(found)
    }

    fn prefix_length(&self) -> usize {
        self.0.iter().map(|hook| hook.prefix_length()).sum()
    }
}
