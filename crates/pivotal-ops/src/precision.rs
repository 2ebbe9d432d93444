//! The number format of a matrix product's operands.

/// How the operands of a matrix product are rounded. Sums are always taken in `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Operands stay in `f32`.
    #[default]
    F32,
    /// Operands are rounded to bfloat16 (8 bits of mantissa) as they are packed; tensors, sums and gradients stay `f32`.
    /// A processor without bfloat16 dot products, and a device other than the processor, computes in `f32`.
    Bf16,
}
