//! The exactness of a zero adapter: a graph that it was folded into gives the base graph's outputs bit for bit, logits and
//! cache, padding included.

use ndarray::{Array2, ArrayD};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::run::{GraphRunner, Script, replay};
use super::{Open, Ports, Result};
use crate::runtime::{self, NamedValues, Port, RuntimeInfo, Session, Tensor, Value};

/// A base graph and the same with a zero adapter folded in, in one runtime.
pub struct NoOpPair<'a> {
    /// A name for the report: the runtime's.
    pub name: String,
    /// Opens the base graph.
    pub base: Open<'a>,
    /// Opens the graph with the zero adapter.
    pub folded: Open<'a>,
}

/// The first element in which two graphs differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FirstDifference {
    /// The case.
    pub case: String,
    /// Which call: 0 is the prefill, then the cached steps.
    pub call: usize,
    /// The output.
    pub output: String,
    /// The element, by dimension; empty where shapes or types differ.
    pub index: Vec<usize>,
    /// What the base graph gives there.
    pub base: String,
    /// What the folded graph gives there.
    pub folded: String,
}

impl std::fmt::Display for FirstDifference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { case, call, output, index, base, folded } = self;
        write!(
            f,
            "{output}{index:?} is {base} in the base graph and {folded} with the zero adapter ({case}, call {call})"
        )
    }
}

/// A session that keeps a copy of everything that it gives.
struct Recorder<S> {
    inner: S,
    calls: Vec<NamedValues>,
}

impl<S: Session> Session for Recorder<S> {
    fn inputs(&self) -> &[Port] {
        self.inner.inputs()
    }

    fn outputs(&self) -> &[Port] {
        self.inner.outputs()
    }

    fn info(&self) -> RuntimeInfo {
        self.inner.info()
    }

    fn activate(&mut self, models: &[usize]) -> runtime::Result<()> {
        self.inner.activate(models)
    }

    fn run_tensors(&mut self, feeds: Vec<(String, Tensor)>) -> runtime::Result<Vec<(String, Tensor)>> {
        let outputs = self.inner.run_tensors(feeds)?;
        let outputs = outputs.into_iter().map(|(name, tensor)| Ok((name, tensor.into_value()?)));
        let outputs = outputs.collect::<runtime::Result<NamedValues>>()?;
        self.calls.push(outputs.clone());
        Ok(outputs.into_iter().map(|(name, value)| (name, value.into())).collect())
    }
}

/// What one graph gives in all cases.
pub(super) struct Outputs {
    pub(super) info: RuntimeInfo,
    /// By case, by call.
    cases: Vec<Vec<NamedValues>>,
}

/// Replays all scripts in one session, which is closed afterwards.
pub(super) fn outputs<'a>(open: Open<'_>, ports: Ports, scripts: impl Iterator<Item = &'a Script>) -> Result<Outputs> {
    let mut runner = GraphRunner::new(Recorder { inner: open()?, calls: Vec::new() }, ports.head_dim)?;
    let mut cases = Vec::new();
    for script in scripts {
        replay(&mut runner, script, ports.vocab)?;
        cases.push(std::mem::take(&mut runner.session_mut().calls));
    }
    Ok(Outputs { info: runner.session_mut().info(), cases })
}

/// The logits of a script, `[spots, vocab]`, and the outputs of its last call.
type LastOutputs = (Array2<f64>, NamedValues);

/// The logits of all scripts in one session, and the outputs of each script's last call.
pub(super) fn last_outputs<'a>(
    open: Open<'_>,
    ports: Ports,
    scripts: impl Iterator<Item = &'a Script>,
) -> Result<(RuntimeInfo, Vec<LastOutputs>)> {
    let mut runner = GraphRunner::new(Recorder { inner: open()?, calls: Vec::new() }, ports.head_dim)?;
    let mut cases = Vec::new();
    for script in scripts {
        let logits = replay(&mut runner, script, ports.vocab)?;
        let last = std::mem::take(&mut runner.session_mut().calls).pop();
        cases.push((logits, last.unwrap_or_default()));
    }
    Ok((runner.session_mut().info(), cases))
}

/// The number of tensors compared, and the first difference.
pub(super) fn compare(names: &[&str], base: &Outputs, folded: &Outputs) -> Result<(usize, Option<FirstDifference>)> {
    let mut tensors = 0;
    for ((case, base), folded) in names.iter().zip(&base.cases).zip(&folded.cases) {
        for (call, (base, folded)) in base.iter().zip(folded).enumerate() {
            for (output, base) in base.iter() {
                tensors += 1;
                let found = difference(base, folded.get(output))?;
                if let Some((index, base, folded)) = found {
                    let (case, output) = (String::from(*case), output.to_owned());
                    return Ok((tensors, Some(FirstDifference { case, call, output, index, base, folded })));
                }
            }
        }
    }
    Ok((tensors, None))
}

/// The first element in which two tensors differ: its index and both values.
fn difference(base: &Value, folded: Option<&Value>) -> Result<Option<(Vec<usize>, String, String)>> {
    let kind = |value: &Value| format!("{} {:?}", value.dtype(), value.shape());
    let Some(folded) = folded else { return Ok(Some((vec![], kind(base), "absent".into()))) };
    if base.dtype() != folded.dtype() || base.shape() != folded.shape() {
        return Ok(Some((vec![], kind(base), kind(folded))));
    }
    let (base, folded) = (Elements::of(base)?, Elements::of(folded)?);
    let found = base.bits.indexed_iter().zip(&folded.bits).find(|((_, base), folded)| base != folded);
    Ok(found.map(|((index, of_base), of_folded)| {
        (ndarray::Dimension::slice(&index).to_vec(), base.show(*of_base), base.show(*of_folded))
    }))
}

/// A tensor's elements as bit patterns, which tell zeros of either sign apart and NaN equal to itself.
struct Elements {
    is_float: bool,
    bits: ArrayD<u64>,
}

impl Elements {
    fn of(value: &Value) -> Result<Self> {
        let is_float = value.dtype().is_float();
        let bits = if is_float {
            value.clone().into_f64()?.mapv(f64::to_bits)
        } else {
            value.clone().into_i64()?.mapv(i64::cast_unsigned)
        };
        Ok(Self { is_float, bits })
    }

    fn show(&self, bits: u64) -> String {
        if self.is_float { format!("{:e}", f64::from_bits(bits)) } else { bits.cast_signed().to_string() }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;

    fn values(array: Array2<f32>) -> Value {
        array.into_dyn().into()
    }

    #[test]
    fn bits_decide() {
        let base = values(arr2(&[[1.0, 0.0], [f32::NAN, 2.0]]));
        assert_eq!(difference(&base, Some(&base)).unwrap(), None);
        let negative = values(arr2(&[[1.0, -0.0], [f32::NAN, 2.0]]));
        let found = difference(&base, Some(&negative)).unwrap();
        assert_eq!(found, Some((vec![0, 1], "0e0".into(), "-0e0".into())));
        let next = values(arr2(&[[1.0, 0.0], [f32::NAN, 2.0f32.next_up()]]));
        assert_eq!(difference(&base, Some(&next)).unwrap().unwrap().0, [1, 1]);
    }

    #[test]
    fn shapes_types_and_names_count() {
        let base = values(arr2(&[[1.0, 2.0]]));
        let turned = values(arr2(&[[1.0], [2.0]]));
        let found = difference(&base, Some(&turned)).unwrap();
        assert_eq!(found, Some((vec![], "f32 [1, 2]".into(), "f32 [2, 1]".into())));
        let wide: Value = arr2(&[[1f64, 2.0]]).into_dyn().into();
        assert_eq!(difference(&base, Some(&wide)).unwrap().unwrap().2, "f64 [1, 2]");
        assert_eq!(difference(&base, None).unwrap().unwrap().2, "absent");
        let integers: Value = arr2(&[[7i64]]).into_dyn().into();
        let others: Value = arr2(&[[-7i64]]).into_dyn().into();
        assert_eq!(difference(&integers, Some(&others)).unwrap(), Some((vec![0, 0], "7".into(), "-7".into())));
    }
}
