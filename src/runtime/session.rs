//! What every runtime offers: ports, a run, and facts about itself.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{DType, Error, NamedValues, Result, Tensor, Value};

/// An input or output of a graph.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Name in the graph.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Declared dimensions.
    pub dims: Vec<Dim>,
}

/// A declared dimension.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Dim {
    /// A number.
    Fixed(usize),
    /// A name or an expression of names: `batch_size`, `past_sequence_length + sequence_length`.
    Named(String),
    /// Nothing is declared.
    Unknown,
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Named(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let dims: Vec<String> = self.dims.iter().map(Dim::to_string).collect();
        write!(f, "{}: {}[{}]", self.name, self.dtype, dims.join(", "))
    }
}

/// Which runtime ran a graph, and how. Goes into reports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RuntimeInfo {
    /// `onnxruntime` or `tract`.
    pub runtime: String,
    /// Its version.
    pub version: String,
    /// The device that runs the nodes.
    pub device: String,
    /// The graph optimisation in force, in the runtime's terms.
    pub optimization: String,
    /// The shared library, for a runtime that is loaded.
    pub library: Option<PathBuf>,
}

/// A graph loaded into a runtime.
pub trait Session: Send {
    /// The inputs that must be fed, in the graph's order.
    fn inputs(&self) -> &[Port];

    /// The inputs that have a default and may be fed as well.
    fn optional_inputs(&self) -> &[Port] {
        &[]
    }

    /// The outputs, in the graph's order.
    fn outputs(&self) -> &[Port];

    /// Which runtime this is.
    fn info(&self) -> RuntimeInfo;

    /// Runs the graph. The outputs stay in the runtime's memory until they are read or fed back.
    ///
    /// # Errors
    /// When the feeds are not the graph's inputs (checked before the runtime sees them), or the runtime fails.
    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>>;

    /// A tensor for many runs ([`Tensor::again`]), in the runtime's own memory where it has such in this process.
    ///
    /// # Errors
    /// When the runtime does not take it.
    fn hold(&self, value: Value) -> Result<Tensor> {
        Ok(value.into())
    }

    /// Chooses what the rows of the next runs are for, by numbers that whoever opened the session gave meaning to, as
    /// [`WithGiven::switching`](super::WithGiven::switching) does. A session that has no choice ignores it.
    ///
    /// # Errors
    /// When the graph cannot run these in one batch.
    fn activate(&mut self, _models: &[usize]) -> Result<()> {
        Ok(())
    }

    /// How many nodes ran on each execution provider, by the runtime's own profile of its first run; none where the runtime
    /// makes no profile or has not run yet.
    fn nodes(&self) -> Option<BTreeMap<String, usize>> {
        None
    }

    /// Runs the graph with all inputs and outputs in host memory.
    ///
    /// # Errors
    /// As [`run_tensors`](Self::run_tensors).
    fn run(&mut self, feeds: NamedValues) -> Result<NamedValues> {
        let feeds = feeds.into_iter().map(|(name, value)| (name, value.into())).collect();
        let outputs = self.run_tensors(feeds)?;
        outputs.into_iter().map(|(name, tensor)| Ok((name, tensor.into_value()?))).collect()
    }
}

macro_rules! forward {
    ($type:ty) => {
        impl<S: Session + ?Sized> Session for $type {
            fn inputs(&self) -> &[Port] {
                (**self).inputs()
            }
            fn optional_inputs(&self) -> &[Port] {
                (**self).optional_inputs()
            }
            fn outputs(&self) -> &[Port] {
                (**self).outputs()
            }
            fn info(&self) -> RuntimeInfo {
                (**self).info()
            }
            fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> Result<Vec<(String, Tensor)>> {
                (**self).run_tensors(feeds)
            }
            fn hold(&self, value: Value) -> Result<Tensor> {
                (**self).hold(value)
            }
            fn activate(&mut self, models: &[usize]) -> Result<()> {
                (**self).activate(models)
            }
            fn nodes(&self) -> Option<BTreeMap<String, usize>> {
                (**self).nodes()
            }
        }
    };
}

forward!(Box<S>);
forward!(&mut S);

/// Puts feeds into the order of the inputs, the optional ones that are fed last, after checking that each input is fed once with
/// its type and a shape that fits, that dimensions of one name agree, and that nothing else is fed.
pub(super) fn order_feeds(
    inputs: &[Port],
    optional: &[Port],
    feeds: Vec<(String, Tensor)>,
) -> Result<Vec<(String, Tensor)>> {
    let mut given: HashMap<String, Tensor> = HashMap::with_capacity(feeds.len());
    for (name, tensor) in feeds {
        match given.entry(name) {
            Entry::Vacant(free) => free.insert(tensor),
            Entry::Occupied(taken) => {
                return Err(Error::Feed { reason: format!("the input `{}` was given twice", taken.key()) });
            }
        };
    }
    let mut sizes: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    // A merged decoder names its dimensions as only one of its two graphs has them.
    let merged = inputs.iter().any(|port| port.name == "use_cache_branch");
    let mut ordered = Vec::with_capacity(given.len());
    for (port, is_optional) in inputs.iter().map(|port| (port, false)).chain(optional.iter().map(|port| (port, true))) {
        let Some((name, tensor)) = given.remove_entry(&port.name) else {
            if is_optional {
                continue;
            }
            return Err(Error::Feed { reason: format!("the input {port} is missing") });
        };
        let dtype = tensor.dtype()?;
        if dtype != port.dtype {
            return Err(Error::Feed { reason: format!("the input {port} was given {dtype} elements") });
        }
        check_shape(port, &tensor.shape(), &mut sizes)?;
        if merged {
            sizes.clear();
        }
        ordered.push((name, tensor));
    }
    let Some(unknown) = given.into_keys().min() else { return Ok(ordered) };
    let inputs: Vec<String> = inputs.iter().map(Port::to_string).collect();
    Err(Error::Feed { reason: format!("it has no input `{unknown}`; it has {}", inputs.join("; ")) })
}

fn check_shape<'a>(port: &'a Port, shape: &[usize], sizes: &mut BTreeMap<&'a str, (usize, &'a str)>) -> Result<()> {
    let misfit = |why: String| Error::Feed { reason: format!("the input {port} was given shape {shape:?}{why}") };
    if shape.len() != port.dims.len() {
        return Err(misfit(String::new()));
    }
    for (dim, size) in port.dims.iter().zip(shape) {
        match dim {
            Dim::Fixed(fixed) if fixed != size => return Err(misfit(String::new())),
            Dim::Named(name) => {
                let (known, by) = *sizes.entry(name).or_insert((*size, &port.name));
                if known != *size {
                    return Err(misfit(format!(", but {name} is {known} in `{by}`")));
                }
            }
            Dim::Fixed(_) | Dim::Unknown => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Value;

    fn port(name: &str, dtype: DType, dims: &[Dim]) -> Port {
        Port { name: name.into(), dtype, dims: dims.into() }
    }

    fn feed(name: &str, dtype: DType, shape: &[usize]) -> (String, Tensor) {
        (name.into(), Value::zeros(dtype, shape).unwrap().into())
    }

    #[test]
    fn feeds_are_checked_before_the_runtime_sees_them() {
        let batch = || Dim::Named("batch".into());
        let inputs =
            [port("ids", DType::I64, &[batch(), Dim::Unknown]), port("past", DType::F32, &[batch(), Dim::Fixed(2)])];
        let reason = |feeds| order_feeds(&inputs, &[], feeds).unwrap_err().to_string();
        let ids = || feed("ids", DType::I64, &[3, 5]);
        let past = || feed("past", DType::F32, &[3, 2]);

        let ordered = order_feeds(&inputs, &[], vec![past(), ids()]).unwrap();
        assert_eq!(ordered.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["ids", "past"]);
        assert!(reason(vec![ids()]).contains("past: f32[batch, 2] is missing"));
        assert!(reason(vec![ids(), past(), feed("x", DType::F32, &[])]).contains("no input `x`; it has ids: i64"));
        assert!(reason(vec![ids(), past(), ids()]).contains("`ids` was given twice"));
        assert!(reason(vec![feed("ids", DType::I32, &[3, 5]), past()]).contains("given i32 elements"));
        assert!(reason(vec![ids(), feed("past", DType::F32, &[3, 4])]).contains("given shape [3, 4]"));
        assert!(reason(vec![ids(), feed("past", DType::F32, &[3])]).contains("given shape [3]"));
        assert!(reason(vec![ids(), feed("past", DType::F32, &[1, 2])]).contains("but batch is 3 in `ids`"));
    }
}
