//! What a graph is judged by: the reference's logits, and candle's own distance at the graph's precision.

use super::*;
use crate::base::{DeviceChoice, is_out_of_memory};
use crate::cli::device::{self, with_memory_help};
use crate::parity::Together;

/// The check by thresholds where they are stated, without judgement where they should be.
pub(super) fn judged(check: Check, graph: &Graph, options: &VerifyArgs) -> Result<Check> {
    let thresholds =
        Thresholds { max_kl: options.max_kl, min_top1: options.min_top1, max_ppl_diff: options.max_ppl_diff };
    Ok(match (thresholds.is_empty(), is_quantised(graph.graph())) {
        (false, _) => check.by_thresholds(thresholds)?,
        (true, true) => check.without_judgement(),
        (true, false) => check,
    })
}

/// Whether weights or activations are integers. Their rounding is no error of the graph, and the budget says nothing about it.
pub(super) fn is_quantised(graph: &OnnxGraph) -> bool {
    const NAMES: [&str; 4] = ["DequantizeLinear", "MatMulInteger", "DynamicQuantizeLinear", "MatMulNBits"];
    let is_one = |op: &str| {
        NAMES.contains(&op)
            || op.starts_with("QLinear")
            || op.starts_with("QAttention")
            || op == "DynamicQuantizeMatMul"
    };
    graph.nodes().iter().any(|node| is_one(node.op_type()) || node.subgraphs().any(is_quantised))
}

/// The reference's logits and candle's own distance, computed or kept from before; no model stays in memory.
pub(super) fn prepare(
    context: &Context,
    checkpoint: &Checkpoint,
    (lineup, adapters): (&Lineup, &[Adapted]),
    graph: &Graph,
    options: &VerifyArgs,
    facts: &[FileFact],
) -> Result<Check> {
    let spec = checkpoint.spec();
    let precision = precision_of(graph);
    let cases = cases(checkpoint, lineup, options)?;
    let mut budget = Budget::of(precision, spec)?;
    if let Some(factor) = options.factor {
        budget.factor = factor;
    }
    let store = ReferenceStore::new(context.cache.join("references"), output::bytes(&options.cache_size)?);
    let is_input =
        |fact: &&FileFact| fact.role == "weights" || !adapters.is_empty() && fact.role.starts_with("adapter");
    let hashes = facts.iter().filter(is_input).map(|fact| fact.sha256.clone());
    let numbers =
        format!("{} {} {} {spec:?}", options.reference.dtype().as_str(), precision.as_str(), lineup.names.join(" "));
    let key = ReferenceStore::key(&hashes.chain([numbers]).collect::<Vec<_>>(), &cases);
    let kept =
        if options.no_cache { None } else { store.load(&key, cases.clone(), options.reference.dtype().as_str(), spec) };
    let (reference, own) = match kept {
        Some(kept) => kept,
        None => {
            let (reference, own) = compute(checkpoint, (lineup, adapters), precision, options, cases)?;
            if !options.no_cache
                && let Err(error) = store.save(&key, &reference, &own)
            {
                tracing::warn!("the reference is not kept for the next time: {error}");
            }
            (reference, own)
        }
    };
    Ok(Check::with_logits(reference, &own, precision.as_str(), budget)?)
}

fn compute(
    checkpoint: &Checkpoint,
    (lineup, adapters): (&Lineup, &[Adapted]),
    precision: DType,
    options: &VerifyArgs,
    cases: Vec<Case>,
) -> Result<(Reference, Vec<Array2<f64>>)> {
    let device = device::open(options.device, false, 0)?;
    let on = |device: &Device, cases: Vec<Case>| -> Result<(Reference, Vec<Array2<f64>>)> {
        let hooks = lineup.hooks(adapters, checkpoint.spec(), device)?;
        let reference = {
            let decoder = Decoder::load(checkpoint, options.reference.dtype(), device)?;
            Reference::compute_each(&models(&decoder, &hooks), cases)?
        };
        let decoder = Decoder::load(checkpoint, precision, device)?;
        let own = reference.replay_each(&models(&decoder, &hooks))?;
        Ok((reference, own))
    };
    if device.is_cpu() {
        return on(&device, cases);
    }
    on(&device, cases.clone()).or_else(|error| match is_out_of_memory(error.as_ref()) {
        true if options.device == DeviceChoice::Auto => {
            tracing::warn!("the reference does not fit the GPU: it is computed on the CPU");
            on(&Device::Cpu, cases)
        }
        true => Err(with_memory_help(error, || "use --device cpu, or --reference f32".into())),
        false => Err(error),
    })
}

/// Asks whether rounding in another order of sums explains what failed.
pub(super) fn reconsider(
    check: &mut Check,
    checkpoint: &Checkpoint,
    (lineup, adapters): (&Lineup, &[Adapted]),
    graph: &Graph,
) -> Result<()> {
    if precision_of(graph) != DType::F32 {
        return Ok(());
    }
    let hooks = lineup.hooks(adapters, checkpoint.spec(), &Device::Cpu)?;
    let mut loaded = None;
    check.reconsider(|reference, order, cases| {
        let decoder = match loaded.take() {
            Some(decoder) => decoder,
            None => Decoder::load(checkpoint, DType::F32, &Device::Cpu)?,
        };
        reference.in_order(&models(loaded.insert(decoder), &hooks), order, cases)
    })?;
    Ok(())
}

/// Looks for the cause of a failure, by the models that a graph may be in the checkpoint's place.
pub(super) fn explain(
    check: &mut Check,
    checkpoint: &Checkpoint,
    (lineup, adapters): (&Lineup, &[Adapted]),
    options: &VerifyArgs,
) -> Result<()> {
    let hooks = lineup.hooks(adapters, checkpoint.spec(), &Device::Cpu)?;
    let dtype = options.reference.dtype();
    check.explain(|reference, suspect, cases| {
        let weight = |weight: &crate::base::WeightShape| {
            let action = crate::base::Error::candle("loading a weight");
            checkpoint.weight(weight.role)?.to_dtype(dtype).map_err(action)
        };
        let decoder = Decoder::from_weights(&suspect.spec, weight)?;
        reference.suspected(&models(&decoder, &hooks), suspect, cases)
    })?;
    Ok(())
}

/// A decoder with each of the lineup's hooks.
pub(super) fn models<'a>(decoder: &'a Decoder, hooks: &'a [Together]) -> Vec<Model<'a>> {
    hooks.iter().map(|hook| Model { decoder, hook }).collect()
}

/// The type that a graph computes in: the least precise of its inputs, outputs and weights.
pub(super) fn precision_of(graph: &Graph) -> DType {
    let graph = graph.graph();
    let ports = graph.inputs().iter().chain(graph.outputs()).filter_map(|port| port.elem_type());
    let is_weight = |tensor: &&crate::onnx::TensorInfo| tensor.dims().iter().product::<i64>() > 1;
    let weights = graph.initializers().iter().filter(is_weight).map(|tensor| tensor.data_type());
    let types: Vec<DataType> = ports.chain(weights).collect();
    let has = |data_type: &DataType| types.contains(data_type);
    match () {
        () if has(&DataType::Bfloat16) => DType::BF16,
        () if has(&DataType::Float16) => DType::F16,
        () if has(&DataType::Float) => DType::F32,
        () if has(&DataType::Double) => DType::F64,
        () => DType::F32,
    }
}
