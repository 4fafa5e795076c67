//! What can be refused before the store is asked. Pure: the list, the topology as last read,
//! and nothing else.

use handfast_proto::MAX_ITEMS;

use super::Error;
use crate::message::{Invalid, NewMessage, limits};
use crate::topology::{Producer, Topology};

/// Several items of one list, together; a single item may be larger.
pub(super) const LIST_BYTES: usize = 1024 * 1024;

/// How a message is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HandOver {
    /// Withheld until decided.
    Prepare,
    /// Already true.
    Publish,
}

/// Refuses a whole list by its size.
pub(super) fn list(field: &str, items: usize, bytes: usize) -> Result<(), Error> {
    if items == 0 {
        return Err(Invalid::new(field, "is empty; a list has 1 to 500 items").into());
    }
    if items > MAX_ITEMS {
        return Err(Invalid::too_large(field, items, MAX_ITEMS, "items").into());
    }
    if items > 1 && bytes > LIST_BYTES {
        return Err(Invalid::too_large(field, bytes, LIST_BYTES, "bytes").into());
    }
    Ok(())
}

/// The caller, if it is registered.
pub(super) fn producer<'a>(topology: &'a Topology, name: &str) -> Result<&'a Producer, Error> {
    limits::name("producer", name)?;
    topology
        .producers
        .get(name)
        .ok_or_else(|| Error::UnknownProducer(name.to_owned()))
}

/// Refuses answers to a subscription whose consumer has to prove who it is: a call proves nothing.
pub(super) fn answers_by_call(topology: &Topology, subscription: &str) -> Result<(), Error> {
    let guarded = topology
        .subscriptions
        .get(subscription)
        .is_some_and(|subscription| subscription.amqp_user.is_some());
    if guarded {
        return Err(Error::AnswersByAmqpOnly {
            subscription: subscription.to_owned(),
        });
    }
    Ok(())
}

/// Refuses a message by where it is to go.
pub(super) fn destination(
    topology: &Topology,
    producer: &Producer,
    verb: HandOver,
    message: &NewMessage,
) -> Result<(), Error> {
    let Some(topic) = topology.topics.get(&message.topic) else {
        return Err(Error::UnknownTopic(message.topic.clone()));
    };
    if !topic.producers.is_empty() && !topic.producers.contains(&message.producer) {
        return Err(Error::TopicNotAllowed {
            producer: message.producer.clone(),
            topic: message.topic.clone(),
        });
    }
    if verb == HandOver::Prepare && producer.status_endpoint.is_none() {
        return Err(Error::NoStatusEndpoint {
            producer: message.producer.clone(),
        });
    }
    if !topic.may_have_no_subscriber && !topology.has_subscriber(&message.topic) {
        return Err(Error::NoSubscriber {
            topic: message.topic.clone(),
        });
    }
    Ok(())
}

/// Lays the store's answers back into the places of the list that it was asked about.
/// `None` if there are not exactly as many answers as places.
pub(super) fn merge<T>(
    places: Vec<Result<(), Error>>,
    answers: impl IntoIterator<Item = Result<T, Error>>,
) -> Option<Vec<Result<T, Error>>> {
    let mut answers = answers.into_iter();
    let merged = places
        .into_iter()
        .map(|place| match place {
            Ok(()) => answers.next(),
            Err(refused) => Some(Err(refused)),
        })
        .collect::<Option<Vec<_>>>()?;
    answers.next().is_none().then_some(merged)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::limits::tests::a_message;
    use crate::message::{DeliveryPolicy, Invalid};
    use crate::topology::{Subscription, Topic};

    fn topology() -> Topology {
        let mut topology = Topology {
            version: 1,
            producers: [("payment".to_owned(), Producer::default())].into(),
            topics: [("payment.completed".to_owned(), Topic::default())].into(),
            subscriptions: Default::default(),
        };
        topology.subscriptions.insert(
            "accounting".into(),
            Subscription {
                topic: "payment.completed".into(),
                policy: DeliveryPolicy::default(),
                max_in_queue: None,
                amqp_user: None,
            },
        );
        topology
    }

    fn asked(topology: &Topology, verb: HandOver) -> Result<(), Error> {
        let producer = producer(topology, "payment").unwrap();
        destination(topology, producer, verb, &a_message())
    }

    #[test]
    fn a_list_has_one_to_500_items_and_1_mib_unless_it_is_one_item() {
        list("messages", 0, 0).unwrap_err();
        list("messages", 500, LIST_BYTES).unwrap();
        list("messages", 501, 0).unwrap_err();
        list("messages", 2, LIST_BYTES + 1).unwrap_err();
        list("messages", 1, LIST_BYTES + 1).unwrap();
    }

    #[test]
    fn a_nameless_producer_is_malformed_and_an_unregistered_one_is_not_found() {
        assert!(matches!(
            producer(&topology(), ""),
            Err(Error::Invalid(Invalid { .. }))
        ));
        assert_eq!(
            producer(&topology(), "nobody"),
            Err(Error::UnknownProducer("nobody".into()))
        );
    }

    #[test]
    fn a_producer_without_status_endpoint_publishes_and_does_not_prepare() {
        assert!(matches!(
            asked(&topology(), HandOver::Prepare),
            Err(Error::NoStatusEndpoint { .. })
        ));
        asked(&topology(), HandOver::Publish).unwrap();
    }

    #[test]
    fn a_topic_without_subscription_refuses_unless_it_says_that_this_is_fine() {
        let mut topology = topology();
        topology.subscriptions.clear();
        assert!(matches!(
            asked(&topology, HandOver::Publish),
            Err(Error::NoSubscriber { .. })
        ));
        for topic in topology.topics.values_mut() {
            topic.may_have_no_subscriber = true;
        }
        asked(&topology, HandOver::Publish).unwrap();
    }

    #[test]
    fn a_topic_with_a_list_of_producers_admits_only_those() {
        let mut topology = topology();
        for topic in topology.topics.values_mut() {
            topic.producers.insert("orders".into());
        }
        assert!(matches!(
            asked(&topology, HandOver::Publish),
            Err(Error::TopicNotAllowed { .. })
        ));
    }

    #[test]
    fn a_subscription_with_an_amqp_user_is_answered_over_amqp_only() {
        let mut topology = topology();
        answers_by_call(&topology, "accounting").unwrap();
        answers_by_call(&topology, "nobody").unwrap();
        let accounting = topology.subscriptions.get_mut("accounting").unwrap();
        accounting.amqp_user = Some("accounting".to_owned());
        assert!(matches!(
            answers_by_call(&topology, "accounting"),
            Err(Error::AnswersByAmqpOnly { .. })
        ));
    }

    #[test]
    fn answers_return_to_their_places() {
        let places = vec![Ok(()), Err(Error::Internal), Ok(())];
        let merged = merge(places.clone(), [Ok(1), Ok(2)]);
        assert_eq!(merged, Some(vec![Ok(1), Err(Error::Internal), Ok(2)]));
        assert_eq!(merge(places.clone(), [Ok(1)]), None);
        assert_eq!(merge(places, [Ok(1), Ok(2), Ok(3)]), None);
    }
}
