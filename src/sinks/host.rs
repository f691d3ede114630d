//! What this machine is called.

/// Its name, or `-` where that has characters that a syslog message cannot have there (RFC 5424, section 6.2.4).
pub fn name() -> String {
    let mut name = [0_u8; 256];
    // SAFETY: the kernel writes at most so many bytes into memory that is ours.
    let asked = unsafe { libc::gethostname(name.as_mut_ptr().cast(), name.len() - 1) };
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    let fits = asked == 0 && (1..=255).contains(&end) && name[..end].iter().all(u8::is_ascii_graphic);
    if fits { String::from_utf8_lossy(&name[..end]).into_owned() } else { "-".to_owned() }
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_machine_has_a_name_that_can_stand_in_a_message() {
        let name = super::name();
        assert!(!name.is_empty() && name.bytes().all(|byte| byte.is_ascii_graphic()), "{name:?}");
    }
}
