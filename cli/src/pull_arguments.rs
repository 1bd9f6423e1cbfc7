//! The command line of `picovm pull`, which is that of `picovm-pull` too.

use clap::Args;
use picovm_engine::{ImageLimits, Platform};

#[derive(Args)]
#[command(after_help = "Examples:
  picovm pull debian
  picovm pull ghcr.io/team/app:v1
  picovm pull localhost:5000/app@sha256:...
  picovm pull --platform linux/arm64 alpine

Credentials are those of `docker login`: ~/.docker/config.json, or the directory DOCKER_CONFIG, with its helpers. A registry on \
this host may do without TLS. What has come stays if a pull ends early, and the next one goes on from there.")]
pub struct PullArguments {
    /// Name of the image, as in Docker
    #[arg(value_name = "NAME[:TAG|@DIGEST]")]
    pub name: String,
    /// Of an image for several platforms, which one
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", default_value_t)]
    pub platform: Platform,
    /// Ask the registry by HTTP, without TLS
    #[arg(long)]
    pub plain_http: bool,
    /// Print the name only
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub limits: LimitOptions,
}

/// How large an image may be.
#[derive(Args)]
pub struct LimitOptions {
    /// Refuse an image that is larger, unpacked, as 512m or 20g
    #[arg(long, value_name = "SIZE", default_value = "64g", value_parser = parse_bytes)]
    pub max_size: u64,
}

impl LimitOptions {
    pub fn limits(&self) -> ImageLimits {
        ImageLimits {
            bytes: self.max_size,
            ..ImageLimits::default()
        }
    }
}

/// Bytes from a size as Docker takes it.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let number: u64 = digits
        .parse()
        .map_err(|_| "a size is a number with b, k, m or g".to_owned())?;
    let unit: u64 = match text
        .get(digits.len()..)
        .unwrap_or_default()
        .to_ascii_lowercase()
        .as_str()
    {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        other => return Err(format!("{other:?} is no unit: use b, k, m or g")),
    };
    number
        .checked_mul(unit)
        .ok_or_else(|| "this is more than any machine has".to_owned())
}
