//! Taking over the chains of processes that died: each request that they left open gets its one `final` record, with outcome
//! `crashed` (contract, section 6).

use std::io;

use super::Metrics;
use super::journal::Journal;
use super::survey::{Dead, Survey};
use crate::ledger::chain::Mark;
use crate::ledger::record::{Id, Moment};
use crate::ledger::{Outcome, Phase};

const CRASHED: &str = "the proxy was killed while this request was open";

/// At most this many records in one write.
const AT_ONCE: usize = 1000;

/// Right behind the first line of our first segment, before any request of ours. The folder is locked.
pub(super) fn adopt(journal: &mut Journal, survey: &mut Survey, metrics: &Metrics) -> io::Result<()> {
    if survey.dead.is_empty() {
        return Ok(());
    }
    for dead in std::mem::take(&mut survey.dead) {
        let writer = dead.last.writer;
        one(journal, dead, metrics)?;
        survey.adopted.insert(writer, journal.writer());
    }
    // Says that all of it is there; and no loss of power may take it back.
    journal.checkpoint()?;
    journal.sync()
}

fn one(journal: &mut Journal, dead: Dead, metrics: &Metrics) -> io::Result<()> {
    let Dead { last, torn_bytes, open } = dead;
    log::warn!("audit: the writer {} died; its {} open requests are recorded as crashed", last.writer, open.len());
    journal.mark(&Mark::Adopted {
        writer: last.writer,
        segment: last.segment,
        count: last.count,
        head: last.head,
        torn_bytes,
        open_requests: open.len() as u64,
    })?;
    let mut records = 0;
    let mut open = open.into_iter().peekable();
    while open.peek().is_some() {
        let events: Vec<Vec<u8>> = open
            .by_ref()
            .take(AT_ONCE)
            .map(|request| {
                let at = Moment::now();
                let id = Id::of(at, Phase::Final, request.id.exchange());
                let mut event = Vec::with_capacity(1024);
                request.into_final(id, at, Outcome::Crashed, CRASHED).write_event(&mut event);
                event
            })
            .collect();
        let events: Vec<&[u8]> = events.iter().map(Vec::as_slice).collect();
        let appended = journal.append(&events, false);
        records += appended.lines as u64;
        appended.result?;
    }
    metrics.audit_adopted(records);
    Ok(())
}
