//! Entropy device (virtio 1.2, 5.4): random bytes from the host.

mod device;

pub use device::Entropy;
