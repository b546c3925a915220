//! Every kernel on a device against the same operation in float64.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, Var};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::ops::{
    Composed, Feature, LogitMap, NormWeights, Visibility, attention, attention_packed, elu, gated, head_linear,
    label_loss, logits_loss, rope,
};
use crate::base::{Activation, Norm, NormKind};

/// How far one kernel is from the truth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Row {
    /// What was computed: the operation, and `gradient of …` for its backward.
    pub kernel: String,
    /// The type of its numbers.
    pub dtype: String,
    /// Of what it was computed.
    pub shape: Vec<usize>,
    /// The largest difference from the result in float64, relative to that result's largest number.
    pub max_error: f64,
    /// What it may be.
    pub tolerance: f64,
}

impl Row {
    /// Whether it is as near as it must be.
    pub fn holds(&self) -> bool {
        self.max_error <= self.tolerance
    }
}

type Operation = Box<dyn Fn(&[Tensor]) -> Result<Tensor>>;

/// An operation with its inputs.
struct Case {
    name: String,
    inputs: Vec<Vec<usize>>,
    /// Those of which the gradient is asked for.
    trained: Vec<usize>,
    /// Roundings to a half type that results take in, their own and those on the way to them.
    roundings: f64,
    operation: Operation,
}

/// Runs each operation that has a kernel on the device, in float32, bfloat16 and float16, values and gradients, and compares with
/// the operation composed in float64 on the CPU, of the same numbers.
///
/// # Errors
/// When an operation fails.
pub fn self_check(device: &Device) -> Result<Vec<Row>> {
    check(device, &[DType::F32, DType::BF16, DType::F16], |_| true)
}

/// Those of some types and names.
pub(super) fn check(device: &Device, dtypes: &[DType], is_asked: impl Fn(&str) -> bool) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for dtype in dtypes.iter().copied() {
        for case in cases()?.into_iter().filter(|case| is_asked(&case.name)) {
            rows.extend(case.check(device, dtype)?);
        }
    }
    Ok(rows)
}

/// Numbers in about [-1, 1] that repeat on no run.
fn numbers(shape: &[usize], seed: usize) -> Result<Tensor> {
    let count: usize = shape.iter().product();
    let values: Vec<f64> = (0..count).map(|i| (0.3 + seed as f64 + i as f64 * 1.618_033).sin()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu)
}

/// How far results of a type may be: float32 by its sums, half types by a number of roundings.
fn tolerance(dtype: DType, roundings: f64) -> f64 {
    match dtype {
        DType::BF16 => roundings / 256.0,
        DType::F16 => roundings / 2048.0,
        _ => 1e-5,
    }
}

impl Case {
    /// The value and the gradients of `Σ value · c`, with a `c` that is exact in `dtype`.
    fn run(&self, inputs: &[Tensor], dtype: DType) -> Result<Vec<Tensor>> {
        let mut given = inputs.to_vec();
        let mut variables = Vec::new();
        for at in &self.trained {
            let variable = Var::from_tensor(&inputs[*at])?;
            given[*at] = variable.as_tensor().clone();
            variables.push(variable);
        }
        let value = (self.operation)(&given)?;
        let weights = numbers(value.dims(), 77)?.to_dtype(dtype)?;
        let weights = weights.to_dtype(value.dtype())?.to_device(value.device())?;
        let store = (&value * weights)?.sum_all()?.backward()?;
        let mut results = vec![value.detach()];
        for variable in &variables {
            match store.get(variable) {
                Some(gradient) => results.push(gradient.clone()),
                None => candle_core::bail!("{}: a gradient is missing", self.name),
            }
        }
        Ok(results)
    }

    fn check(&self, device: &Device, dtype: DType) -> Result<Vec<Row>> {
        let inputs = (0..).zip(&self.inputs).map(|(seed, shape)| numbers(shape, seed)?.to_dtype(dtype));
        let inputs = inputs.collect::<Result<Vec<_>>>()?;
        let wide = inputs.iter().map(|x| x.to_dtype(DType::F64)).collect::<Result<Vec<_>>>()?;
        let truth = {
            let _composed = Composed::on_this_thread();
            self.run(&wide, dtype)?
        };
        let found = self.run(&inputs.iter().map(|x| x.to_device(device)).collect::<Result<Vec<_>>>()?, dtype)?;
        let names = std::iter::once(self.name.clone())
            .chain(self.trained.iter().map(|at| format!("gradient of {}, input {at}", self.name)));
        let row = |(kernel, (truth, found)): (String, (&Tensor, &Tensor))| {
            let found = found.to_device(&Device::Cpu)?.to_dtype(DType::F64)?;
            let (largest, error) = (largest(truth)?, largest(&(found - truth)?)?);
            let max_error = if error == 0.0 { 0.0 } else { error / largest };
            let shape = self.inputs.first().cloned().unwrap_or_default();
            let tolerance = tolerance(dtype, self.roundings);
            Ok(Row { kernel, dtype: dtype.as_str().into(), shape, max_error, tolerance })
        };
        names.zip(truth.iter().zip(&found)).map(row).collect()
    }
}

/// The largest size of a number; infinite where one is none, which is as far from the truth as can be.
fn largest(x: &Tensor) -> Result<f64> {
    let values: Vec<f64> = x.flatten_all()?.to_vec1()?;
    Ok(values.iter().fold(0.0, |largest, x| if x.is_nan() { f64::INFINITY } else { x.abs().max(largest) }))
}

/// What is checked.
fn cases() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    norms(&mut cases);
    rotations(&mut cases);
    activations(&mut cases);
    matrices(&mut cases);
    losses(&mut cases);
    for shape in Scores::all() {
        cases.push(shape.case()?);
        if shape.past == 0 && shape.seq < 100 {
            cases.push(shape.packed()?);
        }
    }
    Ok(cases)
}

fn norms(cases: &mut Vec<Case>) {
    let kinds = [
        ("RMS norm", NormKind::Rms, 0.0, vec![3, 5, 64], vec![64]),
        ("RMS norm, weight from one", NormKind::Rms, 1.0, vec![5, 1096], vec![1096]),
        ("RMS norm of heads", NormKind::Rms, 0.0, vec![2, 3, 4, 20], vec![4, 20]),
        ("layer norm", NormKind::Layer, 0.0, vec![7, 531], vec![531]),
    ];
    for (name, kind, weight_offset, x, weight) in kinds {
        let with_bias = kind == NormKind::Layer;
        let norm = Norm { kind, epsilon: 1e-5, weight_offset, bias: with_bias };
        let operation = move |given: &[Tensor]| {
            let bias = with_bias.then(|| given[2].clone());
            NormWeights { norm, weight: given[1].clone(), bias }.forward(&given[0])
        };
        let inputs = vec![x, weight.clone(), weight];
        cases.push(Case {
            name: name.into(),
            inputs,
            trained: vec![0],
            roundings: 2.0,
            operation: Box::new(operation),
        });
    }
}

fn rotations(cases: &mut Vec<Case>) {
    for (interleaved, width, half) in [(false, 32, 16), (false, 22, 8), (true, 32, 16), (true, 40, 16), (true, 6, 3)] {
        let operation = move |given: &[Tensor]| rope(&given[0], &given[1].cos()?, &given[1].sin()?, interleaved);
        let name = if interleaved { "rotary, interleaved" } else { "rotary" };
        let inputs = vec![vec![2, 5, 3, width], vec![2, 5, half]];
        cases.push(Case {
            name: name.into(),
            inputs,
            trained: vec![0],
            roundings: 2.0,
            operation: Box::new(operation),
        });
    }
}

fn activations(cases: &mut Vec<Case>) {
    let kinds = [
        ("SwiGLU", Activation::Silu),
        ("GeGLU", Activation::Gelu),
        ("GeGLU, tanh", Activation::GeluTanh),
        ("ReGLU", Activation::Relu),
    ];
    for (name, activation) in kinds {
        let operation = move |given: &[Tensor]| gated(activation, &(&given[0] * 4.0)?, &given[1]);
        let inputs = vec![vec![3, 5, 67]; 2];
        cases.push(Case {
            name: name.into(),
            inputs,
            trained: vec![0, 1],
            roundings: 3.0,
            operation: Box::new(operation),
        });
    }
    let operation = |given: &[Tensor]| elu(&(&given[0] * 4.0)?);
    cases.push(Case {
        name: "ELU".into(),
        inputs: vec![vec![9, 33]],
        trained: vec![0],
        roundings: 3.0,
        operation: Box::new(operation),
    });
}

fn matrices(cases: &mut Vec<Case>) {
    for (name, feature, width) in [
        ("matrix of a head, of ELU", Feature::Elu, 32),
        ("matrix of a head, of ELU", Feature::Elu, 7),
        ("matrix of a head", Feature::Identity, 16),
    ] {
        let operation = move |given: &[Tensor]| {
            // queries lie beside keys and values
            let queries = (given[0].narrow(2, 0, 3)? * 2.0)?.transpose(1, 2)?;
            head_linear(&queries, &given[1], feature)
        };
        let inputs = vec![vec![2, 9, 5, width], vec![3, width, 24]];
        let (trained, roundings) = (vec![0, 1], 2.0);
        cases.push(Case { name: name.into(), inputs, trained, roundings, operation: Box::new(operation) });
    }
}

fn losses(cases: &mut Vec<Case>) {
    let targets = [3u32, 1000, 0, 511, 77];
    for (name, vocab, softcap, scale) in [("label loss", 1024, None, 1.0), ("label loss, capped", 1003, Some(6.0), 1.5)]
    {
        let operation = move |given: &[Tensor]| {
            let bias = softcap.is_some().then(|| given[2].clone());
            let map = LogitMap { weight: given[1].clone(), bias, scale, softcap };
            Ok(label_loss(&given[0], &map, &targets)?.nll)
        };
        let inputs = vec![vec![5, 24], vec![vocab, 24], vec![vocab]];
        cases.push(Case {
            name: name.into(),
            inputs,
            trained: vec![0],
            roundings: 3.0,
            operation: Box::new(operation),
        });
    }
    let operation = move |given: &[Tensor]| Ok(logits_loss(&(&given[0] * 8.0)?, &targets)?.nll);
    let inputs = vec![vec![5, 4103]];
    cases.push(Case {
        name: "logits loss".into(),
        inputs,
        trained: vec![0],
        roundings: 3.0,
        operation: Box::new(operation),
    });
}

/// Attention of some sizes.
#[derive(Clone, Copy)]
struct Scores {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    seq: usize,
    /// Keys before the first query's own.
    past: usize,
    width: usize,
    window: Option<usize>,
    /// Padding keys at the start and at the end of every row but the first.
    padding: [usize; 2],
    softcap: Option<f64>,
}

impl Scores {
    fn all() -> Vec<Self> {
        let plain = Self {
            batch: 1,
            heads: 2,
            kv_heads: 1,
            seq: 96,
            past: 0,
            width: 64,
            window: None,
            padding: [0, 0],
            softcap: None,
        };
        vec![
            plain,
            Self { batch: 2, heads: 4, kv_heads: 2, seq: 133, width: 32, padding: [37, 3], ..plain },
            Self { seq: 161, width: 48, window: Some(50), ..plain },
            Self { batch: 2, seq: 70, width: 128, padding: [2, 30], softcap: Some(1.5), ..plain },
            Self { heads: 1, seq: 5, past: 83, width: 80, ..plain },
            Self { seq: 37, past: 3, width: 20, window: Some(9), ..plain },
            Self { heads: 1, seq: 67, width: 256, softcap: Some(2.0), ..plain },
            Self { heads: 1, seq: 19, width: 7, ..plain },
        ]
    }

    fn visibility(&self) -> Result<Visibility> {
        let total = self.past + self.seq;
        let (mut ranges, mut hidden) = (Vec::new(), vec![false; self.batch * total]);
        for row in 0..self.batch {
            let [left, right] = if row == 0 { [0, 0] } else { self.padding };
            for query in 0..self.seq {
                let end = (self.past + query + 1).min(total - right);
                let start = left.max(self.window.map_or(0, |window| end.saturating_sub(window)));
                ranges.push(start..end.max(start));
            }
            // padding in the midst of a row
            hidden[row * total + (left + total) / 2] = row > 0;
        }
        Visibility::new(self.batch, total, ranges, hidden)
    }

    fn case(self) -> Result<Case> {
        let Self { batch, heads, kv_heads, seq, past, width, softcap, .. } = self;
        let visibility = Arc::new(self.visibility()?);
        let scale = 2.0 / (width as f64).sqrt();
        // weights, their gradients and the output, each of which the gradient of queries takes in
        let operation = move |given: &[Tensor]| {
            // heads of a position lie side by side, as projections leave them
            let view = |x: &Tensor| x.transpose(1, 2);
            attention(&view(&given[0])?, &view(&given[1])?, &view(&given[2])?, &visibility, scale, softcap)
        };
        let keys = vec![batch, past + seq, kv_heads, width];
        let inputs = vec![vec![batch, seq, heads, width], keys.clone(), keys];
        Ok(Case {
            name: "attention".into(),
            inputs,
            trained: vec![0, 1, 2],
            roundings: 4.0,
            operation: Box::new(operation),
        })
    }

    /// Of queries, keys and values that lie beside each other.
    fn packed(self) -> Result<Case> {
        let Self { batch, heads, kv_heads, seq, width, softcap, .. } = self;
        let visibility = Arc::new(self.visibility()?);
        let scale = 2.0 / (width as f64).sqrt();
        let operation = move |given: &[Tensor]| attention_packed(&given[0], kv_heads, &visibility, scale, softcap);
        let (name, inputs) = ("attention, packed".into(), vec![vec![batch, seq, heads + 2 * kv_heads, width]]);
        Ok(Case { name, inputs, trained: vec![0], roundings: 4.0, operation: Box::new(operation) })
    }
}
