//! A kernel's call as data: what is compiled, over how many threads it runs, and what it is given.

use candle_core::op::BackpropOp;
use candle_core::{DType, Result, Shape, Storage, Tensor};

/// What the kernels share.
const PRELUDE: &str = include_str!("kernels/prelude.cu");

/// A file of kernels, and what it is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Source {
    /// Normalisation of rows.
    Norm,
    /// Rotary position embedding.
    Rope,
    /// Activations.
    Gate,
    /// Likelihoods of labels.
    Loss,
    /// Orders of heads.
    Heads,
    /// Attention of one head size.
    Attention(Tiling),
}

/// Sizes of the tiles of attention; see `kernels/attention.cu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Tiling {
    pub(super) width: usize,
    pub(super) stages: usize,
    pub(super) forward_keys: usize,
    pub(super) query_keys: usize,
    pub(super) key_queries: usize,
    pub(super) parts: usize,
}

/// Queries that an entry of attention's table of tiles stands for.
pub(super) const GRAIN: usize = 32;

impl Source {
    /// Its kernels.
    #[cfg(test)]
    pub(super) fn entries(self) -> &'static [&'static str] {
        match self {
            Self::Norm => &["norm_forward", "norm_backward"],
            Self::Rope => &["rope"],
            Self::Gate => &["gate_forward", "gate_backward", "elu_forward", "elu_backward", "add_scaled"],
            Self::Heads => &["rearrange"],
            Self::Loss => &["loss_forward", "loss_backward"],
            Self::Attention(_) => &["attention_forward", "attention_dots", "attention_queries", "attention_keys"],
        }
    }

    fn file(self) -> &'static str {
        match self {
            Self::Norm => include_str!("kernels/norm.cu"),
            Self::Rope => include_str!("kernels/rope.cu"),
            Self::Gate => include_str!("kernels/gate.cu"),
            Self::Heads => include_str!("kernels/heads.cu"),
            Self::Loss => include_str!("kernels/loss.cu"),
            Self::Attention(_) => include_str!("kernels/attention.cu"),
        }
    }

    /// The whole text for numbers of a type, complete without any header.
    ///
    /// # Errors
    /// When there are no kernels for the type.
    pub(super) fn text(self, real: DType) -> Result<String> {
        let number = match real {
            DType::F32 => 0,
            DType::F64 => 1,
            DType::BF16 => 2,
            DType::F16 => 3,
            other => candle_core::bail!("there are no kernels for {other:?}"),
        };
        let mut text = format!("#define REAL {number}\n");
        if let Self::Attention(tiling) = self {
            let Tiling { width, stages, forward_keys, query_keys, key_queries, parts } = tiling;
            text += &format!(
                "#define WIDTH {width}\n#define STAGES {stages}\n#define FORWARD_KEYS {forward_keys}\n#define QUERY_KEYS \
                 {query_keys}\n#define KEY_QUERIES {key_queries}\n#define PARTS {parts}\n#define GRAIN {GRAIN}\n"
            );
        }
        Ok(text + PRELUDE + self.file())
    }
}

/// One of a kernel's arguments.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument<'a> {
    /// The numbers of a tensor, from its first on.
    Input(&'a Tensor),
    /// A null pointer.
    None,
    /// The numbers of an output.
    Output(usize),
    I32(i32),
    I64(i64),
    F32(f32),
    F64(f64),
}

impl<'a> From<Option<&'a Tensor>> for Argument<'a> {
    fn from(tensor: Option<&'a Tensor>) -> Self {
        tensor.map_or(Self::None, Self::Input)
    }
}

impl From<bool> for Argument<'_> {
    fn from(x: bool) -> Self {
        Self::I32(x.into())
    }
}

/// A length or a stride of 32 bits.
pub(super) fn int<'a>(x: usize) -> Result<Argument<'a>> {
    match i32::try_from(x) {
        Ok(x) => Ok(Argument::I32(x)),
        Err(_) => candle_core::bail!("a size of {x} is beyond what the kernels count to"),
    }
}

/// A length or a stride of 64 bits.
pub(super) fn long<'a>(x: usize) -> Argument<'a> {
    Argument::I64(x as i64)
}

/// A kernel with all that it is called with.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) source: Source,
    pub(super) real: DType,
    pub(super) entry: &'static str,
    pub(super) grid: [usize; 3],
    pub(super) block: [usize; 2],
    /// Bytes of shared memory beside what the kernel declares itself.
    pub(super) shared: usize,
    pub(super) arguments: Vec<Argument<'a>>,
}

impl Call<'_> {
    /// Runs it on the device of its inputs; every output is new, of that many numbers, and written whole.
    ///
    /// # Errors
    /// When the inputs are on no device that has kernels, or the call fails.
    pub(super) fn run<const N: usize>(&self, outputs: [(DType, usize); N]) -> Result<[Storage; N]> {
        let input = self.arguments.iter().find_map(|argument| match argument {
            Argument::Input(tensor) => Some(*tensor),
            _ => None,
        });
        let Some(input) = input else { candle_core::bail!("{}: no input", self.entry) };
        let storages: Vec<Storage> = match input.device() {
            #[cfg(feature = "cuda")]
            candle_core::Device::Cuda(device) => super::device::run(self, &outputs, device)?,
            #[cfg(test)]
            candle_core::Device::Cpu => super::emulator::run(self, &outputs)?,
            other => candle_core::bail!("{}: there are no kernels for {:?}", self.entry, other.location()),
        };
        match <[Storage; N]>::try_from(storages) {
            Ok(storages) => Ok(storages),
            Err(_) => candle_core::bail!("{}: another number of outputs", self.entry),
        }
    }

    /// Runs it on an output that exists, of which it writes a part.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(super) fn run_on(&self, output: &mut Storage) -> Result<()> {
        match output {
            #[cfg(feature = "cuda")]
            Storage::Cuda(output) => {
                let device = output.device.clone();
                super::device::launch(self, &mut [output], &device)
            }
            #[cfg(test)]
            Storage::Cpu(output) => super::emulator::run_on(self, output),
            _ => candle_core::bail!("{}: the output is on no device that has kernels", self.entry),
        }
    }

    /// Whether its grid holds no block.
    #[cfg(feature = "cuda")]
    pub(super) fn is_empty(&self) -> bool {
        self.grid.contains(&0)
    }

    /// The error of a failure.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn error(&self, why: impl std::fmt::Display) -> candle_core::Error {
        candle_core::Error::msg(format!("kernel {} of {:?}: {why}", self.entry, self.real))
    }
}

/// The tensor of a kernel's output.
pub(super) fn tensor(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// The type that a kernel computes in.
pub(super) fn accumulator(real: DType) -> DType {
    if real == DType::F64 { DType::F64 } else { DType::F32 }
}

/// Whether accesses of 16 bytes are aligned: to tensors that begin and continue at such multiples, in steps of these lengths.
pub(super) fn is_vector(tensors: &[&Tensor], lengths: &[usize]) -> bool {
    let aligned = |tensor: &&Tensor| {
        let lanes = 16 / tensor.dtype().size_in_bytes();
        let outer = tensor.stride().iter().rev().skip(1);
        tensor.layout().start_offset().is_multiple_of(lanes)
            && outer.zip(tensor.dims().iter().rev().skip(1)).all(|(by, size)| *size == 1 || by.is_multiple_of(lanes))
            && lengths.iter().all(|length| length.is_multiple_of(lanes))
    };
    tensors.iter().all(aligned)
}

/// The grid of a loop over `units` by blocks of `threads`.
pub(super) fn grid_of(units: usize, threads: usize) -> [usize; 3] {
    [units.div_ceil(threads).min(1 << 20), 1, 1]
}
