//! Guest side of picovm: root file system images (EROFS) and the initramfs.
//!
//! * [`layer`] makes a layer of a directory or a tar archive;
//! * [`image`] makes an image, a read-only EROFS file, from the layers of an OCI image, or from a directory;
//! * [`unpack`] unpacks archives from untrusted sources;
//! * [`initramfs`] packs init (the crate `picovm-init`) into the archive that the kernel unpacks at boot.

mod archive;
pub mod image;
pub mod initramfs;
pub mod layer;
mod tree;
pub mod unpack;
