//! What the softmax of every layer reads and gives, from the queries and keys that a trace holds.

use ndarray::{Array2, Array3};

use super::place::{At, Place};
use super::reference::Trace;
use crate::base::DecoderSpec;

/// Scores of all layers that are computed at most.
const MOST: usize = 1 << 24;

/// Adds scores, scaled, capped, and left open where they are hidden, and weights, zero there: `[batch, columns, heads · keys]` each.
/// `real` is the mask of all keys so far, `[batch, keys]`.
pub(super) fn add_scores(trace: &mut Trace, spec: &DecoderSpec, real: &Array2<i64>) {
    let attention = &spec.attention;
    let group = attention.num_heads / attention.num_kv_heads.max(1);
    for (number, layer) in spec.layers.iter().enumerate() {
        let at = |place| At::new(number, place);
        let (Some(queries), Some(keys)) = (trace.get(&at(Place::Query)), trace.get(&at(Place::Keys))) else { continue };
        let ((batch, columns, width), (_, all, _)) = (queries.dim(), keys.dim());
        let size = batch * columns * attention.num_heads * all;
        if all != real.ncols() || group == 0 || width % attention.num_heads != 0 || size > MOST / spec.num_layers.max(1)
        {
            continue;
        }
        let inner = width / attention.num_heads;
        let mut scores = Array3::from_elem((batch, columns, attention.num_heads * all), f64::NAN);
        let mut weights = Array3::zeros(scores.raw_dim());
        for (row, column) in (0..batch).flat_map(|row| (0..columns).map(move |column| (row, column))) {
            // the query is the key of its own column
            let own = all - columns + column;
            let first = layer.window.map_or(0, |window| (own + 1).saturating_sub(window));
            let seen: Vec<usize> = (first..=own).filter(|key| real[[row, *key]] == 1).collect();
            for head in 0..attention.num_heads {
                let of_head = |key: usize| -> f64 {
                    let (query, kv) = (head * inner, head / group * inner);
                    let product = (0..inner).map(|i| queries[[row, column, query + i]] * keys[[row, key, kv + i]]);
                    let score = attention.scale * product.sum::<f64>();
                    attention.softcap.map_or(score, |cap| cap * (score / cap).tanh())
                };
                let own: Vec<f64> = seen.iter().map(|key| of_head(*key)).collect();
                let largest = own.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = own.iter().map(|score| (score - largest).exp()).sum();
                for (key, score) in seen.iter().zip(own) {
                    scores[[row, column, head * all + key]] = score;
                    weights[[row, column, head * all + key]] = (score - largest).exp() / sum;
                }
            }
        }
        trace.insert(at(Place::Scores), scores);
        trace.insert(at(Place::Weights), weights);
    }
}
