//! Pieces of a layer that run as one operation each.

use std::collections::BTreeMap;

use candle_core::{Result, Tensor};

use super::decoder::Affine;
use super::ops::{GatedMlp, InnerMap, MlpBlock, NormWeights, OutputProjection, QkvProjection};
use super::{DecoderSpec, Linear, NormSite, Wiring};

/// The weights of a layer.
#[derive(Debug)]
pub(super) struct Weights {
    pub(super) norms: BTreeMap<NormSite, NormWeights>,
    pub(super) linears: BTreeMap<Linear, Affine>,
}

/// What of a layer can run so.
#[derive(Debug)]
pub(super) struct FusedLayer {
    /// Norm, projections and rotation of queries, keys and values.
    pub(super) qkv: Option<QkvProjection>,
    /// The adapter's term, the output map and the residual stream.
    pub(super) output: Option<OutputProjection>,
    /// The feed-forward block, and norm and residual stream around it where they can join.
    pub(super) mlp: Option<(GatedMlp, Option<MlpBlock>)>,
}

/// Joins what the layer's wiring lets join. The projections' weights, where they are frozen, become views of one matrix.
///
/// # Errors
/// When candle fails.
pub(super) fn fuse(spec: &DecoderSpec, weights: &mut Weights) -> Result<FusedLayer> {
    let is_pre_norm = spec.wiring == Wiring::PreNorm;
    let output = weights
        .linears
        .get(&Linear::AttentionOutput)
        .filter(|_| is_pre_norm)
        .map(|affine| OutputProjection { map: affine.map(), scale: spec.residual_scale });
    let mlp = mlp(spec, weights).map(|mlp| {
        let norm = weights.norms.get(&NormSite::Mlp).filter(|_| is_pre_norm);
        let block = norm.map(|norm| MlpBlock { norm: norm.clone(), scale: spec.residual_scale });
        (mlp, block.filter(MlpBlock::is_fused))
    });
    let qkv = if is_pre_norm && spec.attention.qk_norm.is_none() { qkv(spec, weights)? } else { None };
    Ok(FusedLayer { qkv, output: output.filter(OutputProjection::is_fused), mlp })
}

fn mlp(spec: &DecoderSpec, weights: &Weights) -> Option<GatedMlp> {
    let map = |linear| {
        let affine = weights.linears.get(&linear).filter(|affine| affine.bias.is_none());
        affine.map(Affine::map)
    };
    let (gate, up, down) = (map(Linear::Gate)?, map(Linear::Up)?, map(Linear::Down)?);
    let mlp = GatedMlp { gate, up, down, activation: spec.mlp.activation };
    mlp.is_fused().then_some(mlp)
}

fn qkv(spec: &DecoderSpec, weights: &mut Weights) -> Result<Option<QkvProjection>> {
    const PARTS: [Linear; 3] = [Linear::Query, Linear::Key, Linear::Value];
    let Some(norm) = weights.norms.get(&NormSite::Attention) else { return Ok(None) };
    let parts: Vec<&Affine> = PARTS.iter().filter_map(|linear| weights.linears.get(linear)).collect();
    if parts.len() != PARTS.len() {
        return Ok(None);
    }
    let attention = &spec.attention;
    let apart = QkvProjection {
        norm: norm.clone(),
        maps: parts.iter().map(|part| part.map()).collect(),
        rotated_heads: attention.num_heads + attention.num_kv_heads,
        head_dim: attention.head_dim,
    };
    if !apart.is_fused() {
        return Ok(None);
    }
    let is_trained = |part: &&Affine| part.weight.track_op() || part.bias.as_ref().is_some_and(Tensor::track_op);
    if parts.iter().any(is_trained) {
        return Ok(Some(apart));
    }
    let weight = Tensor::cat(&parts.iter().map(|part| &part.weight).collect::<Vec<_>>(), 0)?;
    let biases: Vec<&Tensor> = parts.iter().filter_map(|part| part.bias.as_ref()).collect();
    let bias = match biases.len() {
        0 => None,
        count if count == PARTS.len() => Some(Tensor::cat(&biases, 0)?),
        _ => return Ok(Some(apart)),
    };
    let rows = parts.iter().map(|part| part.weight.dim(0)).collect::<Result<Vec<_>>>()?;
    let qkv = QkvProjection { maps: vec![InnerMap::new(&weight, bias.as_ref())], ..apart };
    let mut start = 0;
    for (linear, rows) in PARTS.into_iter().zip(rows) {
        if let Some(affine) = weights.linears.get_mut(&linear) {
            affine.weight = weight.narrow(0, start, rows)?;
        }
        start += rows;
    }
    Ok(Some(qkv))
}
