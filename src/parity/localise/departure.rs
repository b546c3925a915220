//! What a report says of the first departure.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Place;

/// The first place at which a graph is further from the reference than it may be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Departure {
    /// The case in which it shows.
    pub case: String,
    /// The call of the case: 0 is the first piece of the prompts.
    pub call: usize,
    /// The layer; none before the first and after the last.
    pub layer: Option<usize>,
    /// The place in it.
    pub place: Place,
    /// The branch of an `If` that the call took, as `node.attribute`, where the layers are in branches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// The node that makes the tensor, with its operator.
    pub node: Option<String>,
    /// The tensor.
    pub tensor: String,
    /// The largest absolute distance there.
    pub distance: f64,
    /// How far it may be there: the error budget of this place.
    pub allowed: f64,
    /// The row of the batch where the distance is largest.
    pub row: usize,
    /// The column of the batch there, padding and earlier calls included.
    pub column: usize,
    /// What is wrong.
    pub fault: Fault,
    /// The nodes between what agrees and what departs, with their operators; one where a runtime computes it wrongly.
    pub nodes: Vec<String>,
    /// What the graph does otherwise there, where its nodes show it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// How it was found, and what was not.
    pub notes: Vec<String>,
    /// The folder of the reproducer, where one was written.
    pub reproducer: Option<String>,
}

/// What is wrong where a graph departs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// The graph: runtimes agree on what its nodes compute.
    Graph,
    /// The runtime: another computes a node otherwise from the same inputs, or the fault is gone where nothing is fused.
    Runtime,
    /// No second runtime could compute the nodes.
    Unknown,
}

/// How far a layer's output is from the reference's in a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LayerErrors {
    /// The case.
    pub case: String,
    /// The layer.
    pub layer: usize,
    /// The tensor that was compared.
    pub tensor: String,
    /// The largest absolute distance at each position, as [`RunCase::errors`](crate::parity::RunCase::errors).
    pub errors: Vec<f64>,
}

/// What a mask adds is larger than this.
const HIDDEN: f64 = 1e30;

impl Departure {
    /// The distance in units of what is allowed.
    pub fn times_allowed(&self) -> f64 {
        self.distance / self.allowed.max(f64::MIN_POSITIVE)
    }
}

impl std::fmt::Display for Departure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}, ")?;
        }
        write!(f, "{}: `{}`", self.place.phrase(), self.tensor)?;
        if let Some(node) = &self.node {
            write!(f, " of {node}")?;
        }
        if let Some(branch) = &self.branch {
            write!(f, " in the branch `{branch}`")?;
        }
        if self.distance == f64::MAX {
            f.write_str(" is not finite")?;
        } else if self.distance >= HIDDEN {
            f.write_str(" hides what it should show")?;
        } else {
            write!(f, " is {:.2e} away, {:.1} times what is allowed", self.distance, self.times_allowed())?;
        }
        write!(f, " (case {}, call {}, row {}, column {})", self.case, self.call, self.row, self.column)?;
        match self.fault {
            Fault::Graph => f.write_str("; the graph is at fault"),
            Fault::Runtime => f.write_str("; the runtime is at fault"),
            Fault::Unknown => Ok(()),
        }
    }
}
