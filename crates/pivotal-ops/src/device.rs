//! Where tensors live and operations run: the processor, or a graphics card through Burn's CubeCL backend.
//!
//! A card is a cargo feature of its own (`cuda`, `vulkan`, `metal`), none of them on by default. On a card the operations
//! are those of [`crate::portable`].

use burn::tensor::Device;

/// A kind of device, by the name that `--device` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceName {
    /// The processor, with the fused kernels.
    #[default]
    Cpu,
    /// An NVIDIA card, through CUDA: the first one that the driver lists.
    Cuda,
    /// Any card with a Vulkan driver, through wgpu: the strongest one that wgpu finds.
    Vulkan,
    /// An Apple card, through wgpu.
    Metal,
}

/// Why a device cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// This program was built without it.
    #[error("this program was built without `{name}`: build it with `--features {name}`", name = .0.name())]
    NotBuilt(DeviceName),
    /// This machine has none.
    #[error("this machine has no `{name}` device that its driver shows; `cpu` is always there", name = .0.name())]
    Absent(DeviceName),
}

impl DeviceName {
    /// As `--device`, the cargo feature and the configuration file spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Vulkan => "vulkan",
            Self::Metal => "metal",
        }
    }

    /// The device, after a look whether there is one: Burn's own constructors panic at the first tensor otherwise.
    ///
    /// # Errors
    /// [`DeviceError`] if the feature is off or the machine has no such device.
    ///
    /// # Examples
    /// ```
    /// use pivotal_ops::DeviceName;
    /// assert_eq!(DeviceName::Cpu.open().unwrap(), burn::tensor::Device::flex());
    /// ```
    pub fn open(self) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "cuda")]
            Self::Cuda => self.present(burn::tensor::DeviceType::Cuda, || Device::cuda(0)),
            #[cfg(feature = "vulkan")]
            Self::Vulkan => self.present(burn::tensor::DeviceType::Vulkan, || {
                Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)
            }),
            #[cfg(feature = "metal")]
            Self::Metal => self.present(burn::tensor::DeviceType::Metal, || {
                Device::metal(burn::tensor::DeviceKind::DefaultDevice)
            }),
            #[cfg(not(all(feature = "cuda", feature = "vulkan", feature = "metal")))]
            other => Err(DeviceError::NotBuilt(other)),
        }
    }

    #[cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]
    fn present(
        self,
        kind: burn::tensor::DeviceType,
        open: impl FnOnce() -> Device,
    ) -> Result<Device, DeviceError> {
        match Device::enumerate(kind).is_empty() {
            true => Err(DeviceError::Absent(self)),
            false => Ok(open()),
        }
    }
}

/// The card as it names itself, and what its kernels are compiled for; nothing for the processor.
pub fn card(device: &Device) -> Option<String> {
    #[cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]
    let card = device
        .identity()
        .map(|identity| format!("{}, {}", identity.name, identity.fingerprint));
    #[cfg(not(any(feature = "cuda", feature = "vulkan", feature = "metal")))]
    let card = {
        let _ = device;
        None
    };
    card
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_always_there_and_is_no_card() {
        assert_eq!(card(&DeviceName::default().open().unwrap()), None);
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_device_that_was_not_built_says_how_to_build_it() {
        let error = DeviceName::Cuda.open().unwrap_err();
        assert_eq!(error, DeviceError::NotBuilt(DeviceName::Cuda));
        assert!(error.to_string().contains("--features cuda"), "{error}");
    }
}
