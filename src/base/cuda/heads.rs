//! One matrix for each head.

use candle_core::{Result, Storage, Tensor};

use super::computed;
use super::launch::{Argument, Call, Source, grid_of, int, long, tensor};
use crate::base::ops::Feature;

/// Whether there are kernels for it.
pub(crate) fn takes_heads(x: &Tensor, m: &Tensor) -> bool {
    super::takes(x) && m.dtype() == x.dtype() && x.rank() == 4
}

/// See [`head_linear`](crate::base::ops::head_linear()). Keeps nothing but its inputs.
pub(crate) fn head_linear(x: &Tensor, m: &Tensor, feature: Feature) -> Result<Tensor> {
    let ((batch, heads, seq, width), (m_heads, m_width, out)) = (x.dims4()?, m.dims3()?);
    if (heads, width) != (m_heads, m_width) {
        candle_core::bail!("head-linear: input {:?} does not fit matrices {:?}", x.dims(), m.dims());
    }
    let x = if x.stride().last() == Some(&1) { x.clone() } else { x.contiguous()? };
    let m = m.contiguous()?;
    let (inner, outer) = (Rows { batch, seq, heads, width }, Rows { batch, seq, heads, width: out });
    let made = {
        let y = inner.by_head(&x.detach(), feature)?.matmul(&m.detach())?;
        outer.rearrange((&y, outer.apart()), None, outer.together(), Kind::Copy)?
    };
    let shape = (batch, seq, heads, out);
    let y = computed::of_two([&x, &m], "head-linear", made, shape, move |[x, m], _, grad| {
        let grad = grad.contiguous()?;
        let grad = outer.rearrange((&grad, outer.together()), None, outer.apart(), Kind::Copy)?;
        let grad = tensor(grad, (heads, batch * seq, out));
        let by_matrix = m.track_op().then(|| inner.by_head(&x.detach(), feature)?.transpose(1, 2)?.matmul(&grad));
        let by_x = x.track_op().then(|| {
            let by_feature = grad.matmul(&m.detach().transpose(1, 2)?)?;
            let (at, kind) = match feature {
                Feature::Identity => (None, Kind::Copy),
                Feature::Elu => (Some(x), Kind::EluSlope),
            };
            let dx = inner.rearrange((&by_feature, inner.apart()), at, inner.together(), kind)?;
            tensor(dx, (batch, seq, heads, width)).transpose(1, 2)
        });
        Ok([by_x.transpose()?, by_matrix.transpose()?])
    })?;
    y.transpose(1, 2)
}

/// What becomes of a number; as in `kernels/heads.cu`.
#[derive(Clone, Copy)]
enum Kind {
    Copy = 0,
    Elu = 1,
    EluSlope = 2,
}

/// Sizes of rows of heads.
#[derive(Clone, Copy)]
struct Rows {
    batch: usize,
    seq: usize,
    heads: usize,
    width: usize,
}

/// How far batches, positions and heads are apart.
type Strides = [usize; 3];

impl Rows {
    /// Heads of a position side by side.
    fn together(&self) -> Strides {
        [self.seq * self.heads * self.width, self.heads * self.width, self.width]
    }

    /// All positions of a head, then the next head.
    fn apart(&self) -> Strides {
        [self.seq * self.width, self.width, self.batch * self.seq * self.width]
    }

    /// Strides of `[batch, heads, seq, width]`.
    fn of(x: &Tensor) -> Strides {
        [x.stride()[0], x.stride()[2], x.stride()[1]]
    }

    /// Features of `[batch, heads, seq, width]` as `[heads, batch · seq, width]`.
    fn by_head(&self, x: &Tensor, feature: Feature) -> Result<Tensor> {
        let kind = if feature == Feature::Elu { Kind::Elu } else { Kind::Copy };
        let made = self.rearrange((x, Self::of(x)), None, self.apart(), kind)?;
        Ok(tensor(made, (self.heads, self.batch * self.seq, self.width)))
    }

    fn rearrange(
        &self,
        (x, from): (&Tensor, Strides),
        at: Option<&Tensor>,
        to: Strides,
        kind: Kind,
    ) -> Result<Storage> {
        let Self { batch, seq, heads, width } = *self;
        let (real, count) = (x.dtype(), batch * seq * heads * width);
        let lanes = 16 / real.size_in_bytes();
        let by = at.map_or([0; 3], Self::of);
        let starts = [Some(x), at].into_iter().flatten().map(|tensor| tensor.layout().start_offset());
        let lengths = from.into_iter().chain(by).chain(to).chain([width]);
        let is_vector = starts.chain(lengths).all(|length| length.is_multiple_of(lanes));
        let units = if is_vector { count / lanes } else { count };
        let mut arguments = vec![Argument::Input(x), at.into(), Argument::Output(0), long(units)];
        arguments.extend([int(seq)?, int(heads)?, int(width)?]);
        arguments.extend(from.into_iter().chain(by).chain(to).map(long));
        arguments.extend([Argument::I32(kind as i32), is_vector.into()]);
        let (source, entry, grid) = (Source::Heads, "rearrange", grid_of(units, 256));
        let [made] = Call { source, real, entry, grid, block: [256, 1], shared: 0, arguments }.run([(real, count)])?;
        Ok(made)
    }
}
